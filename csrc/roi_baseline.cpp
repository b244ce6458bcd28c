#define EVAD_ISA baseline
#define EVAD_VECTOR_BYTES 16
#define EVAD_VECTORS 2
#include "roi_simd.h"
