// attention_bwd: Hopper's kernels where they serve, else those of attention_bwd.cuh.
#include "attention_bwd.cuh"

namespace igpt {
namespace cuda {

static void attention_bwd(View dq, View dk, View dv, View dout, View q, View k, View v, View o, View lse, View room,
                          MaskParts mask, bool causal, float scale, Stream stream) {
  check_backward(dq, dk, dv, dout, q, k, v, o, lse, causal, scale, mask);
  IGPT_CHECK(mask.count < 2 ||
                 (room.ndim == 4 && room.numel() == lse.numel() * 4 && room.size[3] == 4 && room.dense() &&
                  room.dtype == q.dtype && room.device == q.device && reinterpret_cast<uintptr_t>(room.data) % 8 == 0),
             "attention_bwd: a mask of several parts needs a room of dense [B, H, Tq, 4] in q's dtype on q's device");
  const OnDevice device(q);
  each_part(mask, [&](const BlockMaskView& part, bool add) {
    if (on_hopper({q, k, v, o, dout, dq}, part, add))
      return attention_bwd_sm90(dq, dk, dv, dout, q, k, v, o, lse, part, causal, scale, stream);
    launch_bwd(dq, dk, dv, dout, q, k, v, o, lse, add ? room : dq, part, causal, scale, add, NoDropout(), stream);
  });
}

void fill_attention_bwd(Ops& t) {
  t.attention_bwd = attention_bwd;
}

}  // namespace cuda
}  // namespace igpt
