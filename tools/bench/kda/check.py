"""Checks the CUDA kernels of KDA against float64: errors as RMS over RMS of the reference."""
import torch

import reference

# Outputs and states, gradients of q, k, v and states, of the gate and beta, of the parameters: what this field accepts
# of bf16 inputs. `sizes` says what errors of the gate's gradients are relative to; da_log's may be as large as df's.
TOLERANCE = {'o': 5e-3, 'state': 5e-3, 'dq': 8e-3, 'dk': 8e-3, 'dv': 8e-3, 'dstate_in': 8e-3, 'df': 2e-2, 'db': 2e-2,
             'da_log': 2e-2, 'ddt_bias': 8e-3}
# Nothing is ever forgotten and every write is whole: the roundings of the bf16 operands of hundreds of steps add up.
NEVER_FORGETS = {'o': 8e-3, 'state': 8e-3, 'dq': 1e-2, 'dk': 1e-2, 'dv': 1e-2, 'dstate_in': 1e-2}


def error(a, b):
    a, b = a.double(), b.double()
    return ((a - b).pow(2).mean().sqrt() / (b.pow(2).mean().sqrt() + 1e-30)).item()


def case(S, L, H, K, *, bound=0.0, f_mean=0.0, f_scale=1.0, dt_mean=-4.0, b_mean=0.0, a_max=16.0, same_keys=0.0,
         starts=None, states=True):
    """Fresh random inputs; starts: per segment the documents' first tokens (negative: before the segment)."""
    n = lambda *shape: torch.randn(*shape, device='cuda')
    bf = lambda x: x.to(torch.bfloat16)
    x = dict(q=bf(n(S, L, H, K)), k=bf(n(S, L, H, K) + same_keys * n(1, 1, H, K)), v=bf(n(S, L, H, K)),
             f=bf(n(S, L, H, K) * f_scale + f_mean), b=bf(n(S, L, H) + b_mean),
             a_log=torch.empty(H, device='cuda').uniform_(1, a_max).log() if bound == 0 else n(H) * 0.3,
             dt_bias=n(H, K) * 0.5 + (dt_mean if bound == 0 else 0.0), scale=K ** -0.5, bound=bound)
    start = torch.full((S, L), -1, dtype=torch.int32)
    for s, row in enumerate(starts or []):
        for i, first in enumerate(row):
            end = row[i + 1] if i + 1 < len(row) else L
            start[s, max(first, 0):end] = first
    x['start'] = start.cuda()
    x['state_in'] = n(S, H, K, K) if states else None
    x['dstate_out'] = n(S, H, K, K) if states else None
    x['d_o'] = bf(n(S, L, H, K))
    return x


def truth(x, chunk):
    """Outputs and gradients in float64, and `df_parts`: the size of what df is the difference of."""
    names = ('q', 'k', 'v', 'f', 'b', 'a_log', 'dt_bias')
    leaves = [x[n].double().requires_grad_() for n in names]
    S, L, H, K = x['q'].shape
    state = (torch.zeros(S, H, K, K, device='cuda', dtype=torch.float64) if x['state_in'] is None
             else x['state_in'].double()).requires_grad_()
    unit = [reference.normalise(leaf) for leaf in leaves[:2]]
    if chunk:
        o, s = reference.chunked(*unit, *leaves[2:], x['scale'], x['bound'], state, chunk)
    else:
        o, s = reference.recurrent(*unit, *leaves[2:], x['start'], x['scale'], x['bound'], state)
    loss = (o * x['d_o'].double()).sum()
    if x['dstate_out'] is not None:
        loss = loss + (s * x['dstate_out'].double()).sum()
    grads = torch.autograd.grad(loss, leaves + [state] + unit)
    want = dict(zip(('o', 'state', 'dq', 'dk', 'dv', 'df', 'db', 'da_log', 'ddt_bias', 'dstate_in'),
                    (o.detach(), s.detach()) + grads))
    # The gradient of log decay at a token adds q dq - k dk over the tokens from it on.
    parts = sum((a.detach() * da).pow(2) for a, da in zip(unit, grads[-2:])).sqrt()
    want['df_parts'] = parts * gate_slope(x)[0].abs()
    return want


def gate_slope(x):
    """Derivative of log decay with respect to f, and what times it is that with respect to a_log."""
    z, rate = x['f'].double() + x['dt_bias'].double(), x['a_log'].double().exp()[:, None]
    if x['bound'] == 0:
        slope = torch.sigmoid(z)
        return -rate * slope, torch.nn.functional.softplus(z) / slope
    slope = torch.sigmoid(rate * z)
    return x['bound'] * rate * slope * (1 - slope), z


def run(lib, x):
    """Outputs and gradients of the kernels, everything written poisoned first."""
    nan = lambda t: torch.full_like(t, float('nan'))
    S, L, H, K = x['q'].shape
    state = torch.full((S, H, K, K), float('nan'), device='cuda')
    out = dict(o=nan(x['v']), state=state, dstate_in=state.clone(), dq=nan(x['q']), dk=nan(x['k']), dv=nan(x['v']),
               df=nan(x['f']), db=nan(x['b']), da_log=torch.zeros_like(x['a_log']),
               ddt_bias=torch.zeros_like(x['dt_bias']))
    lib.poison()
    lib.forward(x, x['state_in'], out['o'], out['state'])
    lib.poison()
    lib.backward(x, x['state_in'], x['d_o'], x['dstate_out'], out, out['dstate_in'])
    torch.cuda.synchronize()
    return out


def sizes(x, want):
    """What errors of the gate's gradients are relative to, as RMS. Their terms are signed and may come out near zero
    by chance, and where nothing is remembered df is the difference of two equal numbers, of which bf16 operands leave
    their roundings: so the sizes of the terms count beside the sums', and one rounding of the parts (2^-9) is worth as
    much as the tolerance."""
    rms = lambda *parts: sum(p.pow(2) for p in parts).mean().sqrt()
    rounding = want['df_parts'] * 2 ** -9
    terms = (want['df'].pow(2) + (rounding / TOLERANCE['df']).pow(2)).sqrt()
    to_a = gate_slope(x)[1]
    size = dict(df=terms.pow(2).mean().sqrt())
    size['ddt_bias'] = rms(want['ddt_bias'], (rounding / TOLERANCE['ddt_bias']).pow(2).sum((0, 1)).sqrt())
    size['da_log'] = rms(want['da_log'], (terms * to_a).pow(2).sum((0, 1, 3)).sqrt())
    return size


def errors_of(got, want, x):
    """By name, for the names of `got` that have a truth."""
    names = [n for n in want if n in got]
    size = sizes(x, want) if 'df' in want else {}
    return {n: ((got[n].double() - want[n]).pow(2).mean().sqrt() / size[n]).item() if n in size
            else error(got[n], want[n]) for n in names}


def expect(rows, name, got, want, x=None, tolerance=None):
    errors = errors_of(got, want, x)
    limit = TOLERANCE | (tolerance or {})
    # Gradients that vanish (no incoming state) have nothing to be relative to.
    bad = [n for n, e in errors.items() if not e <= limit[n] and not (want[n].abs().max() < 1e-12 and
                                                                        got[n].abs().max() < 1e-6)]
    rows.append(dict(case=name, errors=errors, failed=bad))
    print(f'{name:<46s}' + ' '.join(f'{n}:{1e3 * e:.2f}' for n, e in errors.items()) +
          (f'  FAILED {bad}' if bad else ''), flush=True)
    return not bad


def maps(lib, rows, x, name):
    """M state_in + E and M^T dstate_out + E' against the outgoing states of the truth."""
    S, L, H, K = x['q'].shape
    want = truth(x, 0)
    new = lambda: torch.full((S, H, K, K), float('nan'), device='cuda')
    m, e, back, state, dstate = new(), new(), new(), new(), new()
    lib.poison()
    lib.segment_map(x, m, e)
    lib.poison()
    lib.backward_map(x, x['d_o'], back)
    lib.multiply_add(m, False, x['state_in'], e, state)
    lib.multiply_add(m, True, x['dstate_out'], back, dstate)
    return expect(rows, name, dict(state=state, dstate_in=dstate), {n: want[n] for n in ('state', 'dstate_in')})


def all_cases(lib, quick=False):
    """-> rows, whether everything was within tolerance. Errors are printed in thousandths. quick: short sequences of
    K = 128 and two of K = 64."""
    rows, ok = [], True
    torch.manual_seed(torch.seed() % (1 << 31))
    plan = []  # (name, tokens a chunk of the truth or 0: token by token, shape and regime)
    for K in (128, 64):
        for L in (1, 63, 64, 65, 130):
            plan.append((f'K {K}, length {L}', 0 if L < 100 else 32, dict(S=2, L=L, H=3, K=K)))
        plan += [
            (f'K {K}, length 1000', 32, dict(S=1, L=1000, H=2, K=K)),
            (f'K {K}, no states', 32, dict(S=2, L=200, H=3, K=K, states=False)),
            (f'K {K}, bounded gate', 32, dict(S=1, L=400, H=3, K=K, bound=-5.0)),
            (f'K {K}, bounded gate, fast', 32, dict(S=1, L=300, H=3, K=K, bound=-5.0, f_mean=20.0, f_scale=2.0)),
            (f'K {K}, packed documents', 0, dict(S=2, L=270, H=3, K=K, dt_mean=-6.0,
                                                 starts=[[-7, 3, 16, 17, 40, 64, 70, 128, 200, 255, 256, 269],
                                                         [0, 31, 33, 65, 220]])),
            (f'K {K}, decay near none', 32, dict(S=1, L=500, H=2, K=K, dt_mean=-25.0)),
            (f'K {K}, fast decay', 32, dict(S=1, L=300, H=2, K=K, dt_mean=30.0, f_scale=5.0)),
            (f'K {K}, decay from none to total', 32, dict(S=1, L=300, H=2, K=K, dt_mean=0.0, f_scale=40.0)),
            (f'K {K}, beta near 0', 32, dict(S=1, L=300, H=2, K=K, b_mean=-8.0)),
            (f'K {K}, beta near 1', 32, dict(S=1, L=300, H=2, K=K, b_mean=12.0)),
            (f'K {K}, beta near 1, decay near none', 32, dict(S=1, L=500, H=2, K=K, dt_mean=-25.0, b_mean=12.0)),
            (f'K {K}, keys alike', 32, dict(S=1, L=300, H=2, K=K, dt_mean=-6.0, same_keys=1.0)),
        ]
    plan += [('20 heads', 32, dict(S=1, L=200, H=20, K=128)), ('72 heads', 32, dict(S=6, L=300, H=12, K=128)),
             ('length 4096', 32, dict(S=1, L=4096, H=2, K=128)),
             ('length 4096, bounded gate', 32, dict(S=1, L=4096, H=2, K=128, bound=-5.0)),
             ('length 32768, decay near none', 32, dict(S=1, L=32768, H=2, K=128, dt_mean=-15.0))]
    if quick:
        plan = [c for c in plan if c[2]['L'] < 5000 and (c[2]['K'] == 128 or c[2]['L'] == 130 or 'packed' in c[0])]
    for name, chunk, shape in plan:
        x = case(**shape)
        ok &= expect(rows, name, run(lib, x), truth(x, chunk), x,
                     NEVER_FORGETS if 'beta near 1, decay near none' in name else None)
    ok &= maps(lib, rows, case(S=3, L=140, H=2, K=128, dt_mean=-6.0), 'maps, K 128')
    ok &= maps(lib, rows, case(S=3, L=100, H=2, K=64, dt_mean=-6.0, starts=[[-1], [-4, 30, 64, 90], [0, 1]]),
               'maps, K 64, packed documents')
    x = case(S=2, L=500, H=4, K=128)
    one, two = run(lib, x), run(lib, x)
    same = all(torch.equal(one[n], two[n]) for n in one)
    print('two runs give the same bits:', same, flush=True)
    return rows, ok and same
