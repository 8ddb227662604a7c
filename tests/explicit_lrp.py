"""AttnLRP written out: every rule as a formula on numbers, no gradient anywhere. Slow, one text, models of one block of Llama's kind:
also with LayerNorm, without a gate (StarCoder 2), with norms behind the branches (EXAONE 4), with multipliers (Granite) or experts.

The second formulation of `yfpo.relevance`. Achtibat et al., ICML 2024 (arXiv 2402.05602): linear Eq. 8 (epsilon 0), element-wise Eq. 9,
product Eq. 7, softmax Prop. 3.1, matrix products Prop. 3.3, norms Prop. 3.4.
"""
from types import SimpleNamespace
import torch

def safe(z): return torch.where(z == 0, torch.ones_like(z), z)

def linear(x, layer, R):
    "z_j = sum_i W_ji x_i + b_j; input i gets its part of every z_j"
    z = layer(x)
    W, out = layer.weight, torch.zeros_like(x)
    for j in range(W.shape[0]): out += W[j]*x*(R[:, j]/safe(z[:, j]))[:, None]
    return out

def share(a, b, R):
    "A sum a + b: each term its part"
    return a/safe(a+b)*R, b/safe(a+b)*R

def attention(q, k, v, R, scale):
    "One head, causal: relevance of q, k, v (T, d) from that of the output (T, d)"
    T = len(q)
    Rq, Rk, Rv = (torch.zeros_like(t) for t in (q, k, v))
    for i in range(T):
        s = torch.stack([(q[i]*k[j]).sum()*scale for j in range(i+1)])
        a = torch.softmax(s, 0)
        o = sum(a[j]*v[j] for j in range(i+1))
        R_a = torch.stack([(a[j]*v[j]/safe(o)*R[i]).sum()/2 for j in range(i+1)])            # half to the weights
        for j in range(i+1): Rv[j] += a[j]*v[j]/safe(o)*R[i]/2                               # half to the values
        R_s = s*(R_a - a*R_a.sum())                                                          # softmax with its bias
        for j in range(i+1):
            part = q[i]*k[j]*scale/safe(s[j])*R_s[j]/2                                       # a product of two sums: half to each
            Rq[i] += part; Rk[j] += part
    return Rq, Rk, Rv

def rotated(x, cos, sin, R):
    "x' = M x with M a rotation: the linear rule, written with the rotation's own arithmetic"
    half = x.shape[-1]//2
    a, b = x[:, :half], x[:, half:]
    c, s = cos[:, :half], sin[:, :half]
    u, w = a*c - b*s, b*c + a*s
    Ru, Rw = R[:, :half]/safe(u), R[:, half:]/safe(w)
    return torch.cat([a*c*Ru + a*s*Rw, -b*s*Ru + b*c*Rw], 1), torch.cat([u, w], 1)

def normed(x, norm, R):
    "1/std is a constant; RMSNorm then passes relevance on, and LayerNorm is linear: z_j = w_j r (x_j - mean x) + b_j"
    if 'RMS' in type(norm).__name__: return R
    z, out, r = norm(x), torch.zeros_like(x), (x.var(-1, unbiased=False) + norm.eps).rsqrt()
    for j in range(x.shape[1]):
        part = -x/x.shape[1]
        part[:, j] += x[:, j]
        out += part*(norm.weight[j]*r*R[:, j]/safe(z[:, j]))[:, None]
    return out

def nothing(x): return x

def wide(moe, config):
    "The experts of a layer as one gated MLP, and what multiplies its neurons at each token: (T, E*F), 0 where the router leaves one out"
    experts, router, k = moe.experts, getattr(moe, 'gate', None) or moe.router, config.num_experts_per_tok
    E, D, F = experts.down_proj.shape
    def matrix(rows): layer = torch.nn.Linear(1, 1, False); layer.weight.data = torch.cat(rows, 0); return layer
    mlp = SimpleNamespace(gate_proj=matrix([W[:F] for W in experts.gate_up_proj]), up_proj=matrix([W[F:] for W in experts.gate_up_proj]),
                          down_proj=matrix([torch.cat(list(experts.down_proj), 1)]), act_fn=experts.act_fn)
    def weights(x):
        out = torch.zeros(len(x), E*F, dtype=x.dtype)
        for t, h in enumerate(x):
            p = (router.weight@h).float().exp()
            p = p/p.sum()
            best = sorted(range(E), key=lambda e: -p[e])[:k]
            total = sum(p[e] for e in best) if getattr(config, 'norm_topk_prob', True) else 1
            for e in best: out[t, e*F:(e+1)*F] = p[e]/total
        return out
    return mlp, weights

def block_relevance(model, ids, seeds):
    "(relevance of the block's input (T, D), of its neurons (T, F)) for Y = sum of seeds (T, D) times the normed hidden states"
    m, blk, c = model.model, model.model.layers[0], model.config
    att, mlp, by = blk.self_attn, getattr(blk, 'mlp', None) or blk.block_sparse_moe, getattr(c, 'residual_multiplier', 1.)
    mlp, routed = wide(mlp, c) if hasattr(mlp, 'experts') else (mlp, lambda x: 1.)
    behind, still = hasattr(blk, 'post_feedforward_layernorm'), getattr(att, 'is_sliding', True) is False       # no rotary positions
    norm_o, norm_down = (blk.post_attention_layernorm, blk.post_feedforward_layernorm) if behind else (nothing, nothing)
    with torch.no_grad():
        T = len(ids)
        x = m.embed_tokens(ids)*getattr(c, 'embedding_multiplier', 1.)
        n1 = x if behind else blk.input_layernorm(x)
        cos, sin = (t[0] for t in m.rotary_emb(x[None], torch.arange(T)[None]))
        if still: cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        H, G, d = c.num_attention_heads, c.num_key_value_heads, att.head_dim
        heads = lambda t, n: t.view(T, n, d).transpose(0, 1)
        q, k, v = heads(att.q_proj(n1), H), heads(att.k_proj(n1), G), heads(att.v_proj(n1), G)
        if hasattr(att, 'q_norm'): q, k = att.q_norm(q), att.k_norm(k)
        zero = torch.zeros(T, d, dtype=x.dtype)
        rq, rk = ([rotated(t, cos, sin, zero)[1] for t in ts] for ts in (q, k))
        later = ~torch.ones(T, T, dtype=torch.bool).tril()
        weights = [torch.softmax((rq[h]@rk[h*G//H].T*att.scaling).masked_fill(later, -torch.inf), -1) for h in range(H)]
        O = torch.stack([w@v[h*G//H] for h, w in enumerate(weights)], 1).reshape(T, H*d)
        o = by*norm_o(att.o_proj(O))
        mid = x + o
        n2 = mid if behind else blk.post_attention_layernorm(mid)
        gated, write = hasattr(mlp, 'gate_proj'), getattr(mlp, 'down_proj', None) or mlp.c_proj
        a = routed(n2)*mlp.act_fn(mlp.gate_proj(n2))*mlp.up_proj(n2) if gated else mlp.act(mlp.c_fc(n2))
        down = by*norm_down(write(a))
        end = mid + down

        R = normed(end, m.norm, m.norm(end)*seeds)                   # head: linear
        R_mid, R_down = share(mid, down, R)
        R_a = linear(a, write, R_down)
        R_n2 = linear(n2, mlp.gate_proj, R_a/2) + linear(n2, mlp.up_proj, R_a/2) if gated else linear(n2, mlp.c_fc, R_a)
        R_mid = R_mid + (R_n2 if behind else normed(mid, blk.post_attention_layernorm, R_n2))
        R_x, R_o = share(x, o, R_mid)
        R_O = linear(O, att.o_proj, R_o).view(T, H, d)
        Rq, Rk, Rv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for h in range(H):
            g = h*G//H
            a_q, a_k, a_v = attention(rq[h], rk[g], v[g], R_O[:, h], att.scaling)
            Rq[h] += rotated(q[h], cos, sin, a_q)[0]; Rk[g] += rotated(k[g], cos, sin, a_k)[0]; Rv[g] += a_v
        flat = lambda t: t.transpose(0, 1).reshape(T, -1)
        R_n1 = linear(n1, att.q_proj, flat(Rq)) + linear(n1, att.k_proj, flat(Rk)) + linear(n1, att.v_proj, flat(Rv))
        R_x = R_x + (R_n1 if behind else normed(x, blk.input_layernorm, R_n1))
    return R_x, R_a
