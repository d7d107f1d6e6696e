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

}  // namespace

RandomBlock::RandomBlock(DType dtype, double std, const Stream& stream)
    : stream_(stream),
      memory_("random numbers", static_cast<std::size_t>(distinct) * size_of(dtype), stream.device()),
      numbers_(memory_.allocate(dtype, {distinct}, "random numbers")) {
  const RandomStream random(1, "benchmark weights");
  std::vector<float> values(distinct);
  for (std::int64_t i = 0; i < distinct; ++i) {
    values[static_cast<std::size_t>(i)] = static_cast<float>(std * random.normal(static_cast<std::uint64_t>(i)));
  }
  std::vector<std::byte> rounded(numbers_.bytes());
  const Tensor host(rounded.data(), dtype, {distinct});
  kernels::copy_cast(Stream::cpu(), Tensor(values.data(), DType::f32, {distinct}), host);
  copy(stream, host, numbers_);
  synchronize(stream);
}

void RandomBlock::fill(const Tensor& x, std::string_view name) const {
  const auto first = static_cast<std::int64_t>(stream_of(name) % static_cast<std::uint64_t>(distinct));
  const Tensor flat = x.view({x.numel()});
  for (std::int64_t done = 0; done < flat.numel();) {
    const std::int64_t begin = (first + done) % distinct;
    const std::int64_t n = std::min(distinct - begin, flat.numel() - done);
    copy(stream_, numbers_.rows(begin, begin + n), flat.rows(done, done + n));
    done += n;
  }
}

void fill_randomly(ParameterTable& parameters, const Stream& stream) {
  const RandomBlock block(parameters.dtype(), 0.02, stream);
  for (Parameter& p : parameters.all()) {
    if (p.spec.shape.rank() == 2 && p.value.dtype == parameters.dtype()) {
      block.fill(p.value, p.spec.name);
    } else {
      init_freshly(p, StudentConfig(), 1, stream);
    }
  }
  synchronize(stream);
}

}  // namespace deltapipe::bench
