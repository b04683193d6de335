/* optable.h - the op table. module.c includes it twice, to define the thunks and then the table.
 *
 * ROW(name, spec, rules, ring, documentation, the one line that unpacks arguments into the prototype)
 * r f i32 mat num whole ring: argument as real *, float *, int32_t *, Matrix, number or integer with its default, Ring (three in
 * a row).
 * spec: `name` + marks + `:letters`, arguments in the order of the call, outputs behind `->`.
 *   types    none: real, given as float32   %: float32   @: int32   #: matrix, float32 or uint16 (the bits of bf16)
 *   marks    ! written in place   ? optional   :1 a scalar
 * Equal letters are equal sizes. rules: `h%g` h is a multiple of g; `l=k+1`, `d=k*n`, `p=2*q`; `v>0`.
 * An optional output `dz?` is None unless the argument `z` is given. */
#define STATEFUL "slot@?:b keep@?:b prev@?:bt pos@?:s"
#define RECURRENT STATEFUL " committed@?:s seen@?:s"
#define SCAN_ARGS "x:btd dt:btd A_log%:dn B:btjn C:btkn D%?:d dt_bias%?:d z?:btd "
#define SSD_ARGS "x:btgp dt:bth A_log%:h B:btgn C:bthn D%?:h dt_bias%?:h "
#define LOSS_ARGS \
  "h:mc w#:vc target@:m th?:mk tw#?:vk ids@?:mj log_probs%?:mj tail%?:m wce%?:m wkl%?:m temperature%?:1 kind@?:1 "
#define TEACHER ((Teacher){r(3), mat(4), n['k'], i32(5), f(6), f(7), n['j']})

ROW(linear_forward, "x:btk w#:ok bias%?:o -> y:bto", "", 0, "y = x w^T + bias. At most 16 tokens: row-invariant.",
    linear_forward(r(3), r(0), mat(1), f(2), 0, n['b'], n['t'], n['k'], n['o']))
ROW(linears_forward, "y!:bto y2!:btp x:btk norm%?:k eps%?:1 w#:ok bias%?:o w2#:pk bias2%?:p add@?:1 ->", "", 0,
    "y (= | add 1: +=) u w^T + bias, y2 likewise, u = x or rmsnorm(x) with the weights norm. At most 16 tokens: row-invariant.",
    linears_forward((Product[]){{r(0), mat(5), f(6), n['o']}, {r(1), mat(7), f(8), n['p']}}, 2, r(2), f(3), num(4, 0), num(9, 0) != 0,
                    n['b'], n['t'], n['k']))
ROW(swiglu_linear_forward, "x:btk norm%?:k eps%?:1 gate#:fk bias%?:f up#:fk bias2%?:f -> y:btf", "", 0,
    "y = silu(u gate^T + bias) (u up^T + bias2), u = x or rmsnorm(x) with the weights norm. At most 16 tokens: row-invariant.",
    swiglu_linear_forward(r(7), r(0), f(1), num(2, 0), mat(3), f(4), mat(5), f(6), n['b'], n['t'], n['k'], n['f']))
ROW(linear_backward, "dy:bto x:btk w#:ok dw%!?:ok dbias%!?:o -> dx:btk", "", 0,
    "dx = dy w, dw += dy^T x, dbias += the sum of dy over rows.",
    linear_backward(r(5), f(3), f(4), r(0), r(1), mat(2), 0, n['b'] * n['t'], n['k'], n['o']))
ROW(embedding_forward, "w#:vc ids@:bt -> y:btc", "", 0, "y = w[ids].",
    embedding_forward(r(2), mat(0), i32(1), n['b'] * n['t'], n['c']))
ROW(embedding_backward, "dy:btc ids@:bt dw%!:vc ->", "", 0, "dw[ids] += dy.",
    embedding_backward(f(2), r(0), i32(1), n['b'] * n['t'], n['c']))
ROW(rmsnorm_forward, "x:mc w%:c eps%:1 -> y:mc", "", 0, "y = x rsqrt(mean x^2 + eps) w (Zhang & Sennrich 2019).",
    rmsnorm_forward(r(3), r(0), f(1), num(2, 0), n['m'], n['c']))
ROW(rmsnorm_backward, "dy:mc x:mc w%:c dw%!?:c eps%:1 -> dx:mc", "", 0, "dx =, dw +=.",
    rmsnorm_backward(r(5), f(3), r(0), r(1), f(2), num(4, 0), 0, n['m'], n['c']))
ROW(gated_rmsnorm_forward, "x:mhp z:mhp w%:hp eps%:1 -> y:mhp", "", 0,
    "y = w rmsnorm(x silu(z)) per head (Mamba-2's norm, gate first).",
    gated_rmsnorm_forward(r(4), r(0), r(1), f(2), num(3, 0), n['m'], n['h'], n['p']))
ROW(gated_rmsnorm_backward, "dy:mhp x:mhp z:mhp w%:hp dw%!?:hp eps%:1 -> dx:mhp dz:mhp", "", 0, "dx =, dz =, dw +=.",
    gated_rmsnorm_backward(r(6), r(7), f(4), r(0), r(1), r(2), f(3), num(5, 0), n['m'], n['h'], n['p']))
ROW(swiglu_forward, "gate:mf up:mf -> y:mf", "", 0, "y = silu(gate) up (Shazeer 2020).",
    swiglu_forward(r(2), r(0), r(1), n['m'] * n['f']))
ROW(swiglu_backward, "dy:mf gate:mf up:mf -> dgate:mf dup:mf", "", 0, "dgate =, dup =.",
    swiglu_backward(r(3), r(4), r(0), r(1), r(2), n['m'] * n['f']))
ROW(accumulate, "y!:mf x:mf ->", "", 0, "y += x, elementwise.", accumulate(r(0), r(1), n['m'] * n['f']))
ROW(rope_forward, "x:bthp position@:bt inv_freq%:q scale%?:1 -> y:bthp", "p=2*q", 0,
    "Rotary embedding, half-rotation layout (Su et al. 2021); scale (default 1) multiplies cos and sin.",
    rope_forward(r(4), r(0), i32(1), f(2), num(3, 1), n['b'] * n['t'], n['h'], n['p']))
ROW(rope_backward, "dy:bthp position@:bt inv_freq%:q scale%?:1 -> dx:bthp", "p=2*q", 0, "The transpose of rope_forward.",
    rope_backward(r(4), r(0), i32(1), f(2), num(3, 1), n['b'] * n['t'], n['h'], n['p']))
ROW(attention_forward, "q:bthp k:btgp v:btgp kcache!?:slgp vcache!?:slgp window@?:1 sinks@?:1 scale%?:1 " STATEFUL " -> o:bthp lse%:bht",
    "h%g", 0,
    "Causal GQA attention over the tokens on each token's path through prev and, with caches, those before pos.\n"
    "window: 0 (none) or how many of the last tokens are seen, and with them the first `sinks` (default 0; Xiao et al. 2023): these have\n"
    "the caches' first entries to themselves. scale: default p^-1/2. lse = log sum exp of the scores.",
    attention_forward(r(12), f(13), r(3), r(4), r(0), r(1), r(2), rows, (Rope){0}, num(7, 1 / sqrt((double)n['p'])),
                           whole(5, 0), whole(6, 0), n['b'], n['t'], n['h'], n['g'], n['p'], n['l']))
ROW(attention_backward,
    "do:bthp q:bthp k:btgp v:btgp o:bthp lse%:bht window@?:1 sinks@?:1 scale%?:1 prev@?:bt -> dq:bthp dk:btgp dv:btgp", "h%g", 0,
    "Gradients of attention_forward without caches; o and lse are its outputs (Dao 2023).",
    attention_backward(r(10), r(11), r(12), r(0), r(1), r(2), r(3), r(4), f(5), rows, num(8, 1 / sqrt((double)n['p'])),
        whole(6, 0), whole(7, 0), n['b'], n['t'], n['h'], n['g'], n['p']))
ROW(conv1d_forward, "x:btx w%:dw bias%?:d cache!?:slx silu@?:1 block@?:1 " STATEFUL " -> y:btd", "d%x w>0", 0,
    "Causal depthwise convolution along prev, then SiLU (silu, default 1). d > x: blocks of `block` channels are repeated.",
    conv1d_forward(&(ConvPart){r(10), r(3), r(0), f(1), f(2), n['x'], n['d']}, 1, rows, (int)whole(4, 1), n['b'], n['t'],
                   whole(5, 1), n['w'], n['l']))
ROW(conv1d_backward, "dy:btd x:btx w%:dw bias%?:d dw%!?:dw dbias%!?:d silu@?:1 block@?:1 prev@?:bt -> dx:btx", "d%x w>0", 0,
    "Gradients of conv1d_forward without a cache: dx =, dw +=, dbias +=.",
    conv1d_backward(r(9), f(4), f(5), r(0), r(1), f(2), f(3), rows, (int)whole(6, 1), n['b'], n['t'], n['x'], n['d'],
                         whole(7, 1), n['w']))
ROW(selective_scan_forward, SCAN_ARGS "state%!?:sdn ring_x!?:srd ring_dt%!?:srd ring_B!?:srjn " RECURRENT " -> y:btd",
    "d=k*n k%j", SCAN_RING,
    "Mamba-1: S = exp(softplus(dt + dt_bias) A) S + softplus(dt + dt_bias) B x, y = (C S + D x) silu(z), A = -exp(A_log)\n"
    "(Gu & Dao 2023); channel c reads block c/n of C and block c/n/(k/j) of B. state: initial in, final out.",
    selective_scan_forward(r(18), f(8), ring(9), r(0), r(1), f(2), r(3), r(4), f(5), f(6), r(7), rows, n['b'], n['t'],
        n['d'], n['n'], n['j']))
ROW(selective_scan_backward,
    "dy:btd " SCAN_ARGS "state%?:sdn dstate%!?:sdn dA_log%!?:dn dD%!?:d ddt_bias%!?:d prev@?:bt -> "
    "dx:btd ddt:btd dB:btjn dC:btkn dz?:btd",
    "d=k*n k%j", 0,
    "Gradients of selective_scan_forward without a ring: parameters +=, the rest =. dstate: cotangent of the final state in,\n"
    "of the initial state out.",
    selective_scan_backward(r(15), r(16), f(11), r(17), r(18), f(12), f(13), r(19), f(10), r(0), f(9), r(1), r(2), f(3),
        r(4), r(5), f(6), f(7), r(8), rows, n['b'], n['t'], n['d'], n['n'], n['j']))
ROW(ssd_forward, SSD_ARGS "state%!?:shpn ring_x!?:srgp ring_dt%!?:srh ring_B!?:srgn " RECURRENT " -> y:bthp", "h%g", SSD_RING,
    "Mamba-2: S = exp(-d exp(A_log)) S + d x B^T, y = S C + D x, d = softplus(dt + dt_bias) (Dao & Gu 2024); head h reads\n"
    "group h/(H/G) of x and B. state: initial in, final out.",
    ssd_forward(r(17), f(7), ring(8), r(0), r(1), f(2), r(3), r(4), f(5), f(6), rows, n['b'], n['t'], n['h'], n['g'],
                     n['p'], n['n']))
ROW(ssd_backward,
    "dy:bthp " SSD_ARGS "state%?:shpn dstate%!?:shpn dA_log%!?:h dD%!?:h ddt_bias%!?:h prev@?:bt -> "
    "dx:btgp ddt:bth dB:btgn dC:bthn",
    "h%g", 0, "Gradients of ssd_forward without a ring: parameters +=, the rest =; dstate as in selective_scan_backward.",
    ssd_backward(r(14), r(15), f(10), r(16), r(17), f(11), f(12), f(9), r(0), f(8), r(1), r(2), f(3), r(4), r(5), f(6),
                      f(7), rows, n['b'], n['t'], n['h'], n['g'], n['p'], n['n']))
ROW(lm_loss_forward, LOSS_ARGS "-> ce%:m kl%:m", "v>0", 0,
    "Cross-entropy of target and KL to the teacher's softmax(th tw^T / temperature), both fused with lm_head.\n"
    "kind 0: KL(teacher || student), 1: reverse, 2: Jensen-Shannon; includes temperature^2. Rows of weight 0 (default: target < 0) are skipped.\n"
    "ids, log_probs, tail: instead of th, what top_log_probs gave of the teacher; KL is then over j tokens and any other: a lower bound.",
    lm_loss_forward(f(12), f(13), r(0), mat(1), i32(2), TEACHER, f(8), f(9), num(10, 1), (int)whole(11, 0), n['m'], n['c'], n['v']))
ROW(lm_loss_backward, LOSS_ARGS "dw%!?:vc -> ce%:m kl%:m dh:mc", "v>0", 0,
    "lm_loss_forward and the gradient of sum wce ce + wkl kl: dh =, dw +=.",
    lm_loss_backward(f(13), f(14), r(15), f(12), r(0), mat(1), i32(2), TEACHER, f(8), f(9), num(10, 1), (int)whole(11, 0), n['m'],
                          n['c'], n['v']))
ROW(top_log_probs, "ids@!:mj log_probs%!:mj tail%!:m h:mc w#:vc temperature%?:1 ->", "v>0", 0,
    "The j largest of log softmax(h w^T / temperature) in each row, their ids, and the log of what all others have together.",
    top_log_probs(i32(0), f(1), f(2), r(3), mat(4), num(5, 1), n['m'], n['c'], n['v'], n['j']))
ROW(squared_error_forward, "a:mc b:mc -> y%:m", "", 0, "y = the sum over c of (a - b)^2.",
    squared_error_forward(f(2), r(0), r(1), n['m'], n['c']))
ROW(squared_error_backward, "dy%:m a:mc b:mc -> da:mc", "", 0, "da = 2 dy (a - b).",
    squared_error_backward(r(3), f(0), r(1), r(2), n['m'], n['c']))
ROW(adamw, "w%!:n m#!:n v#!:n grad#:n lr%:1 b1%:1 b2%:1 eps%:1 decay%:1 step@:1 gscale%?:1 key@?:1 first@?:1 ->", "", 0,
    "AdamW with decoupled decay (Loshchilov & Hutter 2019); gradients are multiplied by gscale (default 1) first. Moments in bf16 are\n"
    "rounded at random, by Philox(key, first + index, step).",
    adamw(f(0), NULL, a[1].data, a[2].data, mat(3), FLOAT32, a[1].type, num(4, 0), num(5, 0), num(6, 0), num(7, 0), num(8, 0), num(10, 1),
          whole(9, 1), whole(11, 0), whole(12, 0), n['n']))
ROW(sample, "logits%:bv temperature%:b top_k@:b top_p%:b min_p%:b u%:b -> token@:b", "v>0", 0,
    "Temperature, top-k, top-p, min-p, then the inverse CDF at u in [0,1). temperature 0: the first largest logit.",
    sample(i32(6), f(0), f(1), i32(2), f(3), f(4), f(5), n['b'], n['v']))
ROW(verify,
    "logits%:blv draft@:bk draft_logits%:bkv count@?:b temperature%:b top_k@:b top_p%:b min_p%:b u_accept%:bk u_sample%:bl -> "
    "accepted@:b token@:b",
    "l=k+1 v>0", 0, "Speculative acceptance and resampling (Leviathan et al. 2023); row b drafted count (default k) tokens.",
    verify(i32(10), i32(11), f(0), i32(1), f(2), i32(3), f(4), i32(5), f(6), f(7), f(8), f(9), n['b'], n['k'], n['v']))
ROW(uniform, "index@:b position@:b use@:b low@:b high@:b -> u%:b", "", 0,
    "Philox4x32-10 (Salmon et al. 2011): key (low, high), a seed's words, counter (index, position, use, 0), first word to [0,1).",
    uniform(f(5), i32(0), i32(1), i32(2), i32(3), i32(4), n['b']))
ROW(transfer, "dst#!:nk src#:mk to@:1 from@:1 count@:1 ->", "", 0,
    "Row copies from attention to Mamba: dst[to:to+count] = src[from:from+count], byte-exact for equal dtypes.",
    copy_rows(a[0].data, a[0].type, whole(2, 0), mat(1), whole(3, 0), whole(4, 0), n['k']))
