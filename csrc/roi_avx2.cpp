#define EVAD_ISA avx2
#define EVAD_VECTOR_BYTES 32
#define EVAD_VECTORS 4
#include "roi_simd.h"
