#define EVAD_ISA avx512
#define EVAD_VECTOR_BYTES 64
#define EVAD_VECTORS 4
#include "roi_simd.h"
