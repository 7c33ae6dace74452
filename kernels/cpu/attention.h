// Causal attention, forward and backward, with dropout inside.
//
//   forward    s = softmax_scale * q k^T,  p = softmax(s) over the keys j <= i + k_len - q_len,
//              out = (keep * c * p) v,  lse = log of the sum of e^s        c = 1 / (1 - dropout_p), keep from Philox
//   backward   delta = rowsum(dout * out),  dp = keep * c * dout v^T,  ds = p * (dp - delta),
//              dv = (keep * c * p)^T dout,  dk = softmax_scale * ds^T q,  dq = softmax_scale * ds k
//
// Walk: a block of kBlockM queries goes over the blocks of kBlockN keys from the left up to its diagonal. In forward
// the running maximum m and sum l of a row follow, and acc is rescaled when m grows; backward makes p again from lse
// and adds to dk and dv of the whole head, so that no sum is shared between threads. Parts of a tile right of the
// diagonal are skipped, 4 keys by one vector of queries at a time:
//
//              keys ->                  . skipped   # whole   \ masked
//   queries    # # \ . . .
//      |       # # # \ . .
//      v       # # # # \ .
//
// Layout: the tile of scores is kept transposed, (keys, queries). Its lanes are queries, so that maximum, sum, mask and
// Philox are plain vector operations at any width, and the second product of forward and the last one of backward read
// it column by column. Every product is C (+)= A B of small_gemm.h; only q and dout need their transpose in memory.
//
// bfloat16 becomes float32 where rows are copied, and all arithmetic is float32. But where the processor multiplies
// pairs (simd_bf16.h: vdpbf16ps), a step of a product takes two k. q, k, v and dout are then copied as they are; p and
// ds are rounded to bfloat16 where they are written over the scores; softmax, lse, delta and every sum stay float32.
//
//   product            the two k are    pairs of A                         pairs of B
//   q k^T, dout v^T    dimensions       neighbours in a row of k, v        of q, dout, transposed as pairs
//   p v, ds k          keys             two keys of the tile, lane by lane two rows of v, k, column by column
//   p^T dout, ds^T q   queries          neighbours in a key of the tile    two rows of dout, q, column by column
//
// An odd head_dim or length is filled up with 0, or with a key whose weight is 0; the tile's masks and the numbers of
// Philox are those of float32.
//
// Work: an item is one head, which a thread copies (k, v) once into its workspace, for the rows of a head lie far
// apart, often one a page. Where heads do not divide evenly among threads, a head is cut into parts that take every
// n-th block of queries; dk and dv of the parts are added in their order. So the same number of threads gives the same
// bits, and any number where heads are not cut.
// Bytes: forward reads q, k, v and writes out; backward reads these and dout, and writes dq, dk, dv; once each.
// Papers: Dao, "FlashAttention-2", 2023; Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
//
// What was tried (Zen 3, AVX2, one thread, processor time, head_dim 64; share of the FMA peak of the same run, which
// was 104 GFLOP/s, as other work kept the clock at 3.2 GHz). The tiles were called from C++; from Python, with tensors
// to allocate, they reach 60% and 60% at T = 256, 74% and 77% at 1024. bfloat16 is within 2% of float32.
//
//                                                             T = 256         T = 1024
//                                                             fwd    bwd      fwd    bwd
//   scaled_dot_product_attention of PyTorch 2.13              31%    31%      42%    41%
//   these tiles                                               66%    63%      76%    78%
//   maximum in one instruction, rows prefetched               66%    67%      76%    79%
//   SDPA, dropout 0.1                                          7%    33%       5%    20%
//   these tiles, dropout 0.1                                  56%    60%      65%    73%
//   the same two steps, and the keys of Philox made once      59%    63%      67%    75%
//
// Without gain: k loops unrolled by 2 or 4 (4% slower, GCC orders the FMAs worse), registers as 6 x 2 (the same), 96
// queries or 128 to 256 keys a block (1 to 5% slower), two Philox draws at once (2% slower), pieces of the workspace at
// different offsets within a page (the same). What is left: out of L1 the products run at 98 to 100% of the peak; the
// softmax takes 13% of a tile, and copying rows that lie a page apart 8% of the time.
//
// Pairs with two multiply-adds in the place of vdpbf16ps do not pay: T = 1024 on AVX2, forward and backward, 52 GFLOP/s
// against 84, as both halves of a pair must be taken apart. vdpbf16ps itself has only run in an emulator (Bochs 3.0,
// Sapphire Rapids): the tests pass, and 129 cases gave the bits of the multiply-adds. There T = 1024 takes 0.62 of
// float32's instructions forward and 0.61 backward; inner loops are 16 products to 8 loads, without spills. At 24 FLOP
// an instruction, two cores of 4.3 GHz would need 2.0 instructions a cycle for 400 GFLOP/s: arithmetic, no speed was
// measured.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"
