#include "lanes_avx2.h"
#include "kernels.inl"

namespace llmk {

const Kernels kAvx2 = {"avx2", kExpands, quantize, to_bf16, to_floats, multiply, multiply_tile,
                        rms_norm, add, activate, round_head, restore_head, attend, attend_prompt};

}  // namespace llmk
