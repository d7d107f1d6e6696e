"""KDA in float64 PyTorch, for checks: the recurrence, and a chunked form fast enough for long sequences. Both are
differentiated by autograd. Shapes: q, k, f [S, L, H, K], v [S, L, H, V], b [S, L, H], start [S, L]."""
import torch
import torch.nn.functional as F


def gate(f, a_log, dt_bias, bound):
    x = f + dt_bias
    rate = a_log.exp()[:, None]
    return -rate * F.softplus(x, threshold=1e9) if bound == 0 else bound * torch.sigmoid(rate * x)


def normalise(x):
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def recurrent(q, k, v, f, b, a_log, dt_bias, start, scale, bound, state):
    """-> o, outgoing state; token by token."""
    q, k, g, beta = normalise(q), normalise(k), gate(f, a_log, dt_bias, bound), torch.sigmoid(b)
    decay = g.exp()
    keep = (start != torch.arange(start.shape[1], device=start.device)).to(q.dtype)[:, :, None, None, None]
    out, s = [], state
    for t in range(q.shape[1]):
        s = s * (decay[:, t, :, :, None] * keep[:, t])
        seen = torch.einsum('shk,shkv->shv', k[:, t], s)
        s = s + torch.einsum('shk,shv->shkv', beta[:, t, :, None] * k[:, t], v[:, t] - seen)
        out.append(scale * torch.einsum('shk,shkv->shv', q[:, t], s))
    return torch.stack(out, 1), s


def chunked(q, k, v, f, b, a_log, dt_bias, scale, bound, state, chunk=32):
    """The same for one document that spans every segment; length a multiple of `chunk`."""
    S, L, H, K = q.shape
    cut = lambda x: x.reshape(S, L // chunk, chunk, H, -1).permute(1, 0, 3, 2, 4)  # [N, S, H, C, .]
    q, k, g = cut(normalise(q)), cut(normalise(k)), cut(gate(f, a_log, dt_bias, bound))
    v, beta = cut(v), cut(torch.sigmoid(b)[..., None])
    lower = torch.tril(torch.ones(chunk, chunk, device=q.device, dtype=torch.bool))
    eye = torch.eye(chunk, device=q.device, dtype=q.dtype)
    out, s = [], state
    for n in range(L // chunk):
        G = g[n].cumsum(-2)
        D = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(~lower[:, :, None], float('-inf')).exp()
        kd = k[n][..., None, :, :] * D
        M = beta[n] * torch.einsum('shix,shijx->shij', k[n], kd) * (lower & ~eye.bool())
        Aqk = torch.einsum('shix,shijx->shij', q[n], kd)
        rhs = beta[n] * (v[n] - (k[n] * G.exp()) @ s)
        new = torch.linalg.solve_triangular(eye + M, rhs, upper=False, unitriangular=True)
        out.append(scale * ((q[n] * G.exp()) @ s + Aqk @ new))
        end = G[..., -1:, :]
        s = end.exp().transpose(-1, -2) * s + (k[n] * (end - G).exp()).transpose(-1, -2) @ new
    o = torch.stack(out)  # [N, S, H, C, V]
    return o.permute(1, 0, 3, 2, 4).reshape(S, L, H, -1), s
