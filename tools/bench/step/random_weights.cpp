#include "tools/bench/step/random_weights.h"

#include "core/device_memory.h"
#include "core/random.h"
#include "distill/student_init.h"
#include "kernels/elementwise.h"

#include <algorithm>
#include <cstddef>
#include <vector>

namespace deltapipe::bench {
namespace {

constexpr std::int64_t distinct = 1048573;

/// Numbers first, first + 1, ... of the endless repetition of `block`.
void lay_out(const Stream& stream, const Tensor& block, std::int64_t first, const Tensor& to) {
  const Tensor flat = to.view({to.numel()});
  for (std::int64_t done = 0; done < flat.numel();) {
    const std::int64_t begin = (first + done) % distinct;
    const std::int64_t n = std::min(distinct - begin, flat.numel() - done);
    copy(stream, block.rows(begin, begin + n), flat.rows(done, done + n));
    done += n;
  }
}

}  // namespace

void fill_randomly(ParameterTable& parameters, const Stream& stream) {
  constexpr double std = 0.02;
  const RandomStream random(1, "benchmark weights");
  std::vector<float> values(distinct);
  for (std::int64_t i = 0; i < distinct; ++i) {
    values[static_cast<std::size_t>(i)] = static_cast<float>(std * random.normal(static_cast<std::uint64_t>(i)));
  }
  const DType dtype = parameters.dtype();
  Arena memory("random numbers", static_cast<std::size_t>(distinct) * size_of(dtype), stream.device());
  const Tensor block = memory.allocate(dtype, {distinct}, "random numbers");
  std::vector<std::byte> rounded(block.bytes());
  const Tensor host(rounded.data(), dtype, {distinct});
  kernels::copy_cast(Stream::cpu(), Tensor(values.data(), DType::f32, {distinct}), host);
  copy(stream, host, block);
  synchronize(stream);
  for (Parameter& p : parameters.all()) {
    if (p.spec.shape.rank() != 2 || p.value.dtype != dtype) {
      init_freshly(p, StudentConfig(), 1, stream);
      continue;
    }
    const auto first = static_cast<std::int64_t>(stream_of(p.spec.name) % static_cast<std::uint64_t>(distinct));
    lay_out(stream, block, first, p.value);
  }
  synchronize(stream);
}

}  // namespace deltapipe::bench
