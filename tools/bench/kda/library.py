"""kernels/cuda/kda*.cu on PyTorch tensors, through the C interface of library.cu."""
import ctypes

import torch

Pointer = ctypes.c_void_p


class Problem(ctypes.Structure):
    _fields_ = [(n, Pointer) for n in ('q', 'k', 'v', 'f', 'b', 'a_log', 'dt_bias', 'start')] + [
        ('scale', ctypes.c_float), ('bound', ctypes.c_float), ('segments', ctypes.c_int), ('length', ctypes.c_int),
        ('heads', ctypes.c_int), ('head_dim', ctypes.c_int)]


class Gradients(ctypes.Structure):
    _fields_ = [(n, Pointer) for n in ('dq', 'dk', 'dv', 'df', 'db', 'da_log', 'ddt_bias')]


def address(t):
    return None if t is None else t.data_ptr()


class Library:
    def __init__(self, path):
        self.lib = ctypes.CDLL(path)
        for f in (self.lib.kda_records_bytes, self.lib.kda_backward_workspace):
            f.restype = ctypes.c_size_t
        self.memory = {}

    def problem(self, x):
        """x: dict of tensors and numbers named as in Problem."""
        S, L, H, K = x['q'].shape
        return Problem(*(address(x[n]) for n in ('q', 'k', 'v', 'f', 'b', 'a_log', 'dt_bias', 'start')), x['scale'],
                       x['bound'], S, L, H, K)

    def take(self, kind, size):
        """Memory of that size at least, the same for every call until it must grow."""
        if kind not in self.memory or self.memory[kind].numel() < size:
            self.memory[kind] = None
            self.memory[kind] = torch.empty(size, dtype=torch.uint8, device='cuda')
        return Pointer(self.memory[kind].data_ptr())

    def records(self, p):
        return self.take('records', self.lib.kda_records_bytes(ctypes.byref(p)))

    @staticmethod
    def stream():
        return Pointer(torch.cuda.current_stream().cuda_stream)

    @staticmethod
    def check(status):
        if status != 0:
            raise RuntimeError(f'CUDA error {status}')

    def poison(self):
        for memory in self.memory.values():
            memory.fill_(0xff)  # NaN as float and as bf16

    def forward(self, x, state_in, o, state_out, prepared=False):
        """prepared: the call before was for the same inputs."""
        p = self.problem(x)
        self.check(self.lib.kda_forward(ctypes.byref(p), self.records(p), int(prepared), Pointer(address(state_in)),
                                        Pointer(address(o)), Pointer(address(state_out)), self.stream()))

    def backward(self, x, state_in, d_o, dstate_out, gradients, dstate_in, prepared=False):
        """gradients: dict of tensors named as in Gradients."""
        p = self.problem(x)
        g = Gradients(*(address(gradients.get(n)) for n, _ in Gradients._fields_))
        memory = self.take('backward', self.lib.kda_backward_workspace(ctypes.byref(p)))
        self.check(self.lib.kda_backward(ctypes.byref(p), self.records(p), int(prepared), Pointer(address(state_in)),
                                         Pointer(address(d_o)), Pointer(address(dstate_out)), ctypes.byref(g),
                                         Pointer(address(dstate_in)), memory, self.stream()))

    def segment_map(self, x, m, e):
        p = self.problem(x)
        self.check(self.lib.kda_segment_map(ctypes.byref(p), self.records(p), Pointer(address(m)), Pointer(address(e)),
                                            self.stream()))

    def backward_map(self, x, d_o, e):
        p = self.problem(x)
        self.check(self.lib.kda_backward_map(ctypes.byref(p), self.records(p), Pointer(address(d_o)),
                                             Pointer(address(e)), self.stream()))

    def multiply_add(self, a, transpose, b, c, out):
        n, rows, columns = b.shape[0] * b.shape[1], b.shape[2], b.shape[3]
        self.check(self.lib.kda_multiply_add(n, rows, columns, Pointer(address(a)), int(transpose),
                                             Pointer(address(b)), Pointer(address(c)), Pointer(address(out)),
                                             self.stream()))
