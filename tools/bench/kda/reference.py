"""KDA in float64 PyTorch, for checks: the recurrence, and a chunked form fast enough for long sequences. Both are
differentiated by autograd. q and k come normalised. Shapes: q, k, f [S, L, H, K], v [S, L, H, V], b [S, L, H],
start [S, L]."""
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
    g, beta = gate(f, a_log, dt_bias, bound), torch.sigmoid(b)
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
    """The same for one document that spans every segment."""
    rows = lambda x: x.transpose(1, 2)  # [S, H, L, .]
    q, k, g = rows(q), rows(k), rows(gate(f, a_log, dt_bias, bound))
    v, beta = rows(v), rows(torch.sigmoid(b)[..., None])
    lower = torch.tril(torch.ones(chunk, chunk, device=q.device, dtype=torch.bool))
    eye = torch.eye(chunk, device=q.device, dtype=q.dtype)
    out, s = [], state
    for qn, kn, vn, gn, bn in zip(*(x.split(chunk, 2) for x in (q, k, v, g, beta))):
        n = qn.shape[2]
        low, one = lower[:n, :n], eye[:n, :n]
        G = gn.cumsum(-2)
        D = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(~low[:, :, None], float('-inf')).exp()
        kd = kn[..., None, :, :] * D
        M = bn * torch.einsum('shix,shijx->shij', kn, kd) * (low & ~one.bool())
        Aqk = torch.einsum('shix,shijx->shij', qn, kd)
        rhs = bn * (vn - (kn * G.exp()) @ s)
        new = torch.linalg.solve_triangular(one + M, rhs, upper=False, unitriangular=True)
        out.append(scale * ((qn * G.exp()) @ s + Aqk @ new))
        end = G[..., -1:, :]
        s = end.exp().transpose(-1, -2) * s + (kn * (end - G).exp()).transpose(-1, -2) @ new
    return torch.cat(out, 2).transpose(1, 2), s
