#!/usr/bin/env python3
"""Checks and times the CUDA kernels of KDA, beside flash-linear-attention's chunk_kda in the same process.

    tools/bench/kda/run.py --library build/cuda/tools/bench/kda/libdeltapipe_kda.so --out tools/bench/results/kda.json

Times are medians of CUDA events over calls that rotate among three sets of inputs; the two implementations take turns.
A ratio is the peer's time over ours."""
import argparse
import json
import re
import statistics
import subprocess
import sys

import torch

import check
from compile_ahead import compile_ahead
from library import Library

# Measured ceilings of one H100: copy bandwidth (bytes read and written a second) and bf16 GEMM.
BANDWIDTH, RATE = 3.0e12, 735e12
# A token and head at K = V = 128: floating-point operations, and bytes with every tensor touched once.
COST = {'forward': (182e3, 1.28e3), 'backward': (475e3, 2.3e3)}


def timed(f):
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(4_000_000)  # about 2 ms: the launches are queued before the first of them runs
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


class Ours:
    def __init__(self, lib, x):
        self.lib, self.x = lib, x
        self.o = torch.empty_like(x['v'])
        self.gradients = {n: torch.empty_like(x[t]) for n, t in
                          (('dq', 'q'), ('dk', 'k'), ('dv', 'v'), ('df', 'f'), ('db', 'b'))}
        self.gradients |= {n: torch.zeros_like(x[t]) for n, t in (('da_log', 'a_log'), ('ddt_bias', 'dt_bias'))}

    def forward(self):
        self.lib.forward(self.x, None, self.o, None)

    def backward(self):
        self.lib.backward(self.x, None, self.x['d_o'], None, self.gradients, None)

    def mapped_forward(self):
        """As a rank of a sequence does: its map, then forward with what that prepared."""
        S, L, H, K = self.x['q'].shape
        if not hasattr(self, 'm'):
            self.m, self.e = (torch.empty(S, H, K, K, device='cuda') for _ in range(2))
        self.lib.segment_map(self.x, self.m, self.e)
        self.lib.forward(self.x, None, self.o, None, prepared=True)


class Peer:
    """chunk_kda with gate, norms and sigmoid in the kernel, recomputing intermediates in backward. starts: documents of
    one segment, as check.case takes them. States are transposed there."""

    def __init__(self, x, starts=None):
        from fla.ops.kda import chunk_kda
        self.x = x
        bounds = None if starts is None else torch.tensor(starts[0] + [x['q'].shape[1]], dtype=torch.int32, device='cuda')
        self.leaves = [x[n].clone().requires_grad_() for n in ('q', 'k', 'v', 'f', 'b', 'a_log')]
        self.leaves.append(x['dt_bias'].reshape(-1).clone().requires_grad_())
        self.state_in = None
        if x['state_in'] is not None:
            self.state_in = x['state_in'].transpose(-1, -2).contiguous().requires_grad_()
        bounded = x['bound'] < 0
        self.call = lambda: chunk_kda(
            *self.leaves[:5], scale=x['scale'], A_log=self.leaves[5], dt_bias=self.leaves[6],
            use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True, safe_gate=bounded,
            lower_bound=x['bound'] if bounded else None, disable_recompute=False, state_v_first=True,
            initial_state=self.state_in, output_final_state=self.state_in is not None, cu_seqlens=bounds)
        self.o, self.state = self.call()

    def forward(self):
        with torch.no_grad():
            self.call()

    def backward(self):
        return torch.autograd.grad(self.o, self.leaves, self.x['d_o'], retain_graph=True)

    def results(self):
        """As check.run's; x has states."""
        names = ('dq', 'dk', 'dv', 'df', 'db', 'da_log', 'ddt_bias', 'dstate_in')
        out = dict(zip(names, torch.autograd.grad(
            (self.o, self.state), self.leaves + [self.state_in],
            (self.x['d_o'], self.x['dstate_out'].transpose(-1, -2).contiguous()))))
        out['ddt_bias'] = out['ddt_bias'].reshape(self.x['dt_bias'].shape)
        return out | dict(o=self.o.detach(), state=self.state.detach().transpose(-1, -2),
                          dstate_in=out['dstate_in'].transpose(-1, -2))


def random_documents(length, least=100, most=3000):
    """First tokens of documents of random lengths."""
    starts = [0]
    while starts[-1] + most < length:
        starts.append(starts[-1] + int(torch.randint(least, most + 1, ())))
    return [starts]


def compare(lib, S, L, H, K, bound, peer, repeats, documents=False, ops=('forward', 'backward'), **regime):
    """Times of ours and, taking turns, of the peer. A forward after its map has no peer: its ratio is to forward."""
    if bound < 0:
        regime['dt_mean'] = 0.0
    starts = random_documents(L) if documents else None
    sets = [check.case(S, L, H, K, bound=bound, states=False, starts=starts, **regime) for _ in range(3)]
    ours, theirs = [Ours(lib, x) for x in sets], [Peer(x, starts) for x in sets] if peer else []
    rows, total, peer_total = [], 0.0, 0.0
    shape = dict(segments=S, length=L, heads=H, head_dim=K, bound=bound, documents=len(starts[0]) if starts else 0,
                 **regime)
    title = f'S {S} T {L} H {H} D {K} bound {bound}' + (f' {len(starts[0])} documents' if starts else '') + (
        f' {regime}' if regime else '')
    for op in ops:
        times, peer_times, with_peer = [], [], peer and op in COST
        for i in range(repeats + 5):
            a = timed(getattr(ours[i % 3], op))
            b = timed(getattr(theirs[i % 3], op)) if with_peer else None
            if i >= 5:
                times.append(a)
                peer_times.append(b)
        ms, peer_ms = statistics.median(times), statistics.median(peer_times) if with_peer else None
        row = dict(op='kda_' + op, shape=shape, ms=ms, spread=[min(times), max(times)])
        line = f'{op:<15s}{title}: {ms:.3f} ms'
        if op in COST:
            scale = S * L * H * (K / 128) ** 2
            flop, size = COST[op][0] * scale, COST[op][1] * S * L * H * K / 128
            limit = 1e3 * max(flop / RATE, size / BANDWIDTH)
            row |= dict(bytes=size, flop=flop, fraction_of_limit=limit / ms,
                        peer='flash-linear-attention chunk_kda' if peer else None, peer_ms=peer_ms,
                        ratio=peer_ms / ms if peer else None)
            line += f', {100 * limit / ms:.0f} % of the limit'
            total, peer_total = total + ms, peer_total + (peer_ms or 0.0)
        else:
            row |= dict(of_forward=ms / rows[0]['ms'])
            line += f', {ms / rows[0]["ms"]:.2f} of forward'
        rows.append(row)
        print(line + (f', fla {peer_ms:.3f} ms, ratio {peer_ms / ms:.2f}' if with_peer else ''), flush=True)
    if peer and len(ops) > 1:
        print(f'{"both":<15s}{title}: {total:.3f} ms, fla {peer_total:.3f} ms, ratio {peer_total / total:.2f}',
              flush=True)
    return rows


def phases(lib, x, calls=3):
    """Mean time of each kernel in microseconds."""
    from torch.profiler import ProfilerActivity, profile
    ours = Ours(lib, x)
    ours.forward(), ours.backward()
    torch.cuda.synchronize()
    out = {}
    for op in ('forward', 'backward'):
        with profile(activities=[ProfilerActivity.CUDA]) as p:
            for _ in range(calls):
                getattr(ours, op)()
            torch.cuda.synchronize()
        name = re.compile(r'(\w+)_kernel')
        out[op] = {(name.search(e.key) or [0, e.key])[1]: e.self_device_time_total / e.count
                   for e in p.key_averages() if e.self_device_time_total > 0}
        print(op, {n: round(t) for n, t in out[op].items()}, 'us', flush=True)
    return out


def compare_errors(lib):
    """Ours and the peer's errors against float64 on the same inputs."""
    out = {}
    for name, regime in (('usual', {}), ('bounded gate', dict(bound=-5.0)), ('decay near none', dict(dt_mean=-25.0)),
                         ('fast decay', dict(dt_mean=4.0)), ('beta near 0', dict(b_mean=-8.0)),
                         ('beta near 1', dict(b_mean=8.0)),
                         ('beta near 1, decay near none', dict(dt_mean=-25.0, b_mean=12.0)),
                         ('keys alike', dict(dt_mean=-6.0, same_keys=1.0)),
                         ('length 32768, decay near none', dict(dt_mean=-15.0, length=32768))):
        x = check.case(1, regime.pop('length', 2048), 2, 128, **regime)
        want, theirs, ours = check.truth(x, 32), Peer(x).results(), check.run(lib, x)
        mine, theirs = check.errors_of(ours, want, x), check.errors_of(theirs, want, x)
        out[name] = {n: (mine[n], theirs[n]) for n in mine}
        print(f'errors in thousandths, ours / fla, {name}:',
              ' '.join(f'{n} {1e3 * a:.2f}/{1e3 * b:.2f}' for n, (a, b) in out[name].items()), flush=True)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--library', required=True)
    parser.add_argument('--out')
    parser.add_argument('--commit', default='')
    parser.add_argument('--repeats', type=int, default=30)
    parser.add_argument('--no-peer', action='store_true')
    parser.add_argument('--bounded-peer', action='store_true')
    parser.add_argument('--no-check', action='store_true')
    parser.add_argument('--quick', action='store_true', help='fewer checks')
    parser.add_argument('--only', default='', help='shapes whose title matches this pattern, as printed')
    args = parser.parse_args()
    lib = Library(args.library)
    if not args.no_peer:
        compile_ahead()
    checks, ok = ([], True) if args.no_check else check.all_cases(lib, args.quick)
    print('checks:', 'all within tolerance' if ok else 'FAILED', flush=True)
    smi = subprocess.run(['nvidia-smi', '--query-gpu=name,driver_version', '--format=csv,noheader'],
                         capture_output=True, text=True).stdout.strip().split(', ')
    rows = []
    result = dict(benchmark='kda', gpu=smi[0], driver=smi[-1], commit=args.commit, command=' '.join(sys.argv),
                  rows=rows, checks=checks)

    def save():  # after every shape: what stops the program leaves the rest
        if args.out:
            with open(args.out, 'w') as f:
                json.dump(result, f, indent=1)

    if not args.no_check:
        result['kernels_us'] = phases(lib, check.case(1, 32768, 20, 128, states=False))
    everything = ('forward', 'backward', 'mapped_forward')
    for shape, more in (((1, 32768, 20), dict(ops=everything)), ((1, 4096, 20), dict(ops=everything)),
                        ((1, 8192, 20), dict(ops=everything)), ((1, 32768, 5), {}), ((1, 32768, 10), {}),
                        ((16, 2048, 20), {}), ((1, 32768, 20), dict(documents=True)),
                        ((1, 32768, 20), dict(bound=-5.0)), ((1, 32768, 20), dict(dt_mean=30.0))):
        title = f'S {shape[0]} T {shape[1]} H {shape[2]} ' + ' '.join(more)
        if not re.search(args.only, title):
            continue
        bound = more.pop('bound', 0.0)
        with_peer = not args.no_peer and 'dt_mean' not in more and (bound == 0.0 or args.bounded_peer)
        rows.extend(compare(lib, *shape, 128, bound, with_peer, args.repeats, **more))
        save()
    if not args.no_peer and re.search(args.only, 'errors'):
        result['errors_beside_peer'] = compare_errors(lib)
    save()
    return 0 if ok else 1


if __name__ == '__main__':
    sys.exit(main())
