// Attention of bfloat16 as processors with AVX512_BF16 run it, for those without: built with -DFASTGPT_PAIRS, which
// takes it through pairs, and -DFASTGPT_LANES=16, whose tiles it walks. Two multiply-adds stand in for vdpbf16ps.
#include "../../kernels/cpu/attention.h"

using namespace fastgpt;
using namespace fastgpt::FASTGPT_ISA;

extern "C" {

int64_t forward_floats(const AttentionForwardArgs& a) {
  return attention_forward_floats(a.sizes, DType::kBFloat16, a.num_threads);
}

void forward(const AttentionForwardArgs& a) {
  a.dropout_threshold > 0 ? attention_forward_kernel<Bf16, true>(a) : attention_forward_kernel<Bf16, false>(a);
}

int64_t backward_floats(const AttentionBackwardArgs& a) {
  return attention_backward_floats(a.sizes, DType::kBFloat16, a.num_threads);
}

void backward(const AttentionBackwardArgs& a) {
  a.dropout_threshold > 0 ? attention_backward_kernel<Bf16, true>(a) : attention_backward_kernel<Bf16, false>(a);
}
}
