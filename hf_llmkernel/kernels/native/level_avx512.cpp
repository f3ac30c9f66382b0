#define LLMK_SPARSE_LANES
#include "lanes_avx512.h"
#include "kernels.inl"

namespace llmk {

const Kernels kAvx512 = {"avx512", kExpands, quantize, to_bf16, to_floats, multiply, multiply_tile,
                        rms_norm, add, activate, round_head, restore_head, attend, attend_prompt};

}  // namespace llmk
