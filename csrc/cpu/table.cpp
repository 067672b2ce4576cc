// One instruction set's Ops: the same list for each.
#include "../ops.h"

#define IGPT_TEXT2(x) #x
#define IGPT_TEXT(x) IGPT_TEXT2(x)

namespace igpt {
namespace IGPT_ISA {

void fill_norm(Ops&);
void fill_activation(Ops&);
void fill_cross_entropy(Ops&);
void fill_attention_fwd(Ops&);
void fill_attention_bwd(Ops&);
void fill_attention_decode(Ops&);
void fill_dropout(Ops&);
void fill_linear(Ops&);
void fill_decode_step(Ops&);
void fill_sampling(Ops&);
void fill_palette(Ops&);
void fill_palette_decode(Ops&);

const Ops& table() {
  static const Ops t = [] {
    Ops ops;
    ops.name = IGPT_TEXT(IGPT_ISA);
    fill_norm(ops);
    fill_activation(ops);
    fill_cross_entropy(ops);
    fill_attention_fwd(ops);
    fill_attention_bwd(ops);
    fill_attention_decode(ops);
    fill_dropout(ops);
    fill_linear(ops);
    fill_decode_step(ops);
    fill_sampling(ops);
    fill_palette(ops);
    fill_palette_decode(ops);
    return ops;
  }();
  return t;
}

}  // namespace IGPT_ISA
}  // namespace igpt
