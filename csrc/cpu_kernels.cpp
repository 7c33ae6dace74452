// The CPU kernels for one instruction set. setup.py compiles this file once for each, with FASTGPT_ISA set to its name.
#include "../kernels/cpu/attention.h"
#include "../kernels/cpu/cross_entropy.h"
#include "../kernels/cpu/decode_attention.h"
#include "../kernels/cpu/decoder.h"
#include "../kernels/cpu/decoder_pack.h"
#include "../kernels/cpu/dropout_add_layer_norm.h"
#include "../kernels/cpu/embedding.h"
#include "../kernels/cpu/gelu.h"
#include "../kernels/cpu/gemm.h"
#include "../kernels/cpu/layer_norm.h"
#include "../kernels/cpu/table.h"

#define FASTGPT_TEXT2(x) #x
#define FASTGPT_TEXT(x) FASTGPT_TEXT2(x)

namespace fastgpt {
namespace FASTGPT_ISA {

// Constant data, no constructor: nothing of this file runs before the processor is known to have the instructions.
extern const KernelTable kTable;
const KernelTable kTable = {
    FASTGPT_TEXT(FASTGPT_ISA),
    layer_norm_forward,
    layer_norm_backward,
    dropout_row_floats,
    dropout_add_layer_norm_forward,
    dropout_add_layer_norm_backward,
    gelu_forward,
    gelu_backward,
    embedding_floats,
    embedding_forward,
    embedding_backward,
    cross_entropy,
    decode_attention,
    decoder_floats,
    decoder_step,
    decoder_pack,
    screen_floats,
    screen_rows,
    draw_bytes,
    draw_tokens,
    attention_forward_floats,
    attention_forward,
    attention_backward_floats,
    attention_backward,
    gemm_floats,
    gemm,
};

}  // namespace FASTGPT_ISA
}  // namespace fastgpt
