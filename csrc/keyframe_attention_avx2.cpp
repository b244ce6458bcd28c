#define EVAD_ISA avx2
#define EVAD_VECTOR_BYTES 32
#define EVAD_VECTORS 2
#include "keyframe_attention_simd.h"
