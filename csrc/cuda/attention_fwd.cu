// attention_fwd: Hopper's kernel where it serves, else the one of attention_fwd.cuh.
#include "attention_fwd.cuh"

namespace igpt {
namespace cuda {

static void attention_fwd(View o, View lse, View q, View k, View v, MaskParts mask, bool causal, float scale,
                          Stream stream) {
  check_forward(o, lse, q, k, v, causal, scale, mask);
  if (o.numel() == 0) return;
  const OnDevice device(q);
  each_part(mask, [&](const BlockMaskView& part, bool add) {
    if (on_hopper({q, k, v}, part, add)) return attention_fwd_sm90(o, lse, q, k, v, part, causal, scale, stream);
    launch_fwd(o, lse, q, k, v, part, causal, scale, add, NoDropout(), stream);
  });
}

void fill_attention_fwd(Ops& t) {
  t.attention_fwd = attention_fwd;
}

}  // namespace cuda
}  // namespace igpt
