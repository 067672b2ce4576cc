// attention_dropout_fwd: causal attention whose weights attention_fwd.cuh drops.
#include "attention_fwd.cuh"

namespace igpt {
namespace cuda {

static void attention_dropout_fwd(View o, View lse, View q, View k, View v, float scale, float p, int64_t seed,
                                  Stream stream) {
  check_forward(o, lse, q, k, v, true, scale, MaskParts());
  const Dropout drop(p, seed);
  const OnDevice device(q);
  launch_fwd(o, lse, q, k, v, BlockMaskView(), true, scale, false, drop, stream);
}

void fill_attention_dropout_fwd(Ops& t) {
  t.attention_dropout_fwd = attention_dropout_fwd;
}

}  // namespace cuda
}  // namespace igpt
