// The rules of the optimizers, for sixteen elements of a CPU's vector or one of a GPU's thread: V, with
// broadcast, add, sub, mul, div, sqrt, magnitude, where_greater and where_less of the namespace that
// includes this.
#pragma once

#include "../step.h"

#if !defined(COMMRT_RULES)
#error "define COMMRT_RULES, the namespace, and COMMRT_RULE, how its functions are declared"
#endif

namespace commrt::COMMRT_RULES {

// m <- beta1 m + (1 - beta1) g;  w <- decay w - factor m, where the factor is that of the block:
// step_size / (sqrt(second) / root_correction + eps).
struct AdamMiniRule {
  static constexpr int kMoments = 1;
  static constexpr MomentFormat kEightBits[] = {MomentFormat::kLinear8};
  V keep, share, decay;

  COMMRT_RULE explicit AdamMiniRule(const StepOptions& options)
      : keep(broadcast(options.beta1)),
        share(broadcast((1.0f - options.beta1) * grad_multiplier(options))),
        decay(broadcast(options.decay)) {}

  COMMRT_RULE void operator()(V g, V& w, V (&m)[kMoments], V factor) const {
    m[0] = add(mul(keep, m[0]), mul(share, g));
    w = sub(mul(decay, w), mul(factor, m[0]));
  }
};

// m <- beta1 m + (1 - beta1) g;  v <- beta2 v + (1 - beta2) g^2;
// w <- decay w - step_size m / (sqrt(v) / root_correction + eps).
struct AdamWRule {
  static constexpr int kMoments = 2;
  static constexpr MomentFormat kEightBits[] = {MomentFormat::kSquare8, MomentFormat::kFourth8};
  V keep, share, keep_square, share_square, decay, size, correction, eps;

  COMMRT_RULE AdamWRule(const StepOptions& options, const StepTensor&) {
    const float grad = grad_multiplier(options);
    keep = broadcast(options.beta1);
    share = broadcast((1.0f - options.beta1) * grad);
    keep_square = broadcast(options.beta2);
    share_square = broadcast((1.0f - options.beta2) * (grad * grad));
    decay = broadcast(options.decay);
    size = broadcast(options.step_size);
    correction = broadcast(options.root_correction);
    eps = broadcast(options.eps);
  }

  COMMRT_RULE void operator()(V g, V& w, V (&m)[kMoments]) const {
    m[0] = add(mul(keep, m[0]), mul(share, g));
    m[1] = add(mul(keep_square, m[1]), mul(share_square, mul(g, g)));
    const V root = add(div(sqrt(m[1]), correction), eps);
    w = sub(mul(decay, w), div(mul(size, m[0]), root));
  }
};

// AdamW's, but w stays as it is where |m| < threshold, so not where m is no number.
struct MofoRule : AdamWRule {
  V threshold;

  COMMRT_RULE MofoRule(const StepOptions& options, const StepTensor& tensor)
      : AdamWRule(options, tensor), threshold(broadcast(*tensor.second)) {}

  COMMRT_RULE void operator()(V g, V& w, V (&m)[kMoments]) const {
    const V before = w;
    AdamWRule::operator()(g, w, m);
    w = where_less(magnitude(m[0]), threshold, before, w);
  }
};

// w <- decay w - step_size sign(beta1 m + (1 - beta1) g);  m <- beta2 m + (1 - beta2) g.
struct LionRule {
  static constexpr int kMoments = 1;
  static constexpr MomentFormat kEightBits[] = {MomentFormat::kSquare8};
  V keep, share, keep_after, share_after, decay, size;

  COMMRT_RULE LionRule(const StepOptions& options, const StepTensor&) {
    const float grad = grad_multiplier(options);
    keep = broadcast(options.beta1);
    share = broadcast((1.0f - options.beta1) * grad);
    keep_after = broadcast(options.beta2);
    share_after = broadcast((1.0f - options.beta2) * grad);
    decay = broadcast(options.decay);
    size = broadcast(options.step_size);
  }

  COMMRT_RULE void operator()(V g, V& w, V (&m)[kMoments]) const {
    const V zero = broadcast(0.0f), mixed = add(mul(keep, m[0]), mul(share, g));
    const V up = where_greater(mixed, zero, size), down = where_greater(zero, mixed, size);
    w = sub(mul(decay, w), sub(up, down));
    m[0] = add(mul(keep_after, m[0]), mul(share_after, g));
  }
};

// With d = g - the gradient before, or 0 in the first step:
// m <- beta1 m + (1 - beta1) g;  n <- beta2 n + (1 - beta2) d;
// v <- beta3 v + (1 - beta3) (g + beta2 d)^2;
// w <- decay (w - (step_size m + difference_size n) / (sqrt(v) / root_correction + eps)).
struct AdanRule {
  static constexpr int kMoments = 4;  // m, n, v and the gradient
  static constexpr MomentFormat kEightBits[] = {MomentFormat::kSquare8, MomentFormat::kSquare8,
                                                MomentFormat::kFourth8, MomentFormat::kSquare8};
  V grad, keep, share, keep_difference, share_difference, keep_square, share_square;
  V decay, size, difference_size, correction, eps, has_before;

  COMMRT_RULE AdanRule(const StepOptions& options, const StepTensor&) {
    grad = broadcast(grad_multiplier(options));
    keep = broadcast(options.beta1);
    share = broadcast(1.0f - options.beta1);
    keep_difference = broadcast(options.beta2);
    share_difference = broadcast(1.0f - options.beta2);
    keep_square = broadcast(options.beta3);
    share_square = broadcast(1.0f - options.beta3);
    decay = broadcast(options.decay);
    size = broadcast(options.step_size);
    difference_size = broadcast(options.difference_size);
    correction = broadcast(options.root_correction);
    eps = broadcast(options.eps);
    has_before = broadcast(options.has_before);
  }

  COMMRT_RULE void operator()(V gradient, V& w, V (&m)[kMoments]) const {
    const V g = mul(grad, gradient), difference = mul(has_before, sub(g, m[3]));
    m[0] = add(mul(keep, m[0]), mul(share, g));
    m[1] = add(mul(keep_difference, m[1]), mul(share_difference, difference));
    const V ahead = add(g, mul(keep_difference, difference));
    m[2] = add(mul(keep_square, m[2]), mul(share_square, mul(ahead, ahead)));
    m[3] = g;
    const V root = add(div(sqrt(m[2]), correction), eps);
    const V step = add(mul(size, m[0]), mul(difference_size, m[1]));
    w = mul(decay, sub(w, div(step, root)));
  }
};

// What a rule's moment number k is stored as.
template <typename Rule, Storage storage, int k>
constexpr MomentFormat kMomentFormat =
    storage == Storage::kEightBits ? Rule::kEightBits[k]
    : storage == Storage::kBFloat16 && Rule::kEightBits[k] != MomentFormat::kFourth8
        ? MomentFormat::kBFloat16
        : MomentFormat::kFloat32;

}  // namespace commrt::COMMRT_RULES
