// Numbers that the formulas of both devices share.
#pragma once

namespace igpt {

constexpr float kQuickGelu = 1.702f;           // act(z) = z sigmoid(1.702 z)
constexpr float kLog2e = 1.4426950408889634f;  // exp(x) = exp2(x log2 e)
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kEmptyLse = -1e30f;  // LSE of a query that sees no key: finite, so that exp(s - lse) of a masked s is 0

}  // namespace igpt
