// attention_dropout_bwd: the gradients of attention_dropout_fwd, by the kernels of attention_bwd.cuh.
#include "attention_bwd.cuh"

namespace igpt {
namespace cuda {

static void attention_dropout_bwd(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse,
                                  float scale, float p, int64_t seed, Stream stream) {
  check_backward(dq, dk, dv, dout, q, k, v, o, lse, true, scale, MaskParts());
  const Dropout drop(p, seed);
  const OnDevice device(q);
  launch_bwd(dq, dk, dv, dout, q, k, v, o, lse, dq, BlockMaskView(), true, scale, false, drop, stream);
}

void fill_attention_dropout_bwd(Ops& t) {
  t.attention_dropout_bwd = attention_dropout_bwd;
}

}  // namespace cuda
}  // namespace igpt
