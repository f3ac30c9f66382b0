#include "lanes_portable.h"
#include "kernels.inl"

namespace llmk {

const Kernels kPortable = {"portable", kExpands, quantize, to_bf16, to_floats, multiply, multiply_tile,
                        rms_norm, add, activate, round_head, restore_head, attend, attend_prompt};

}  // namespace llmk
