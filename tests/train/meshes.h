// Meshes and schedules of the tests that run whole tiny runs.
#pragma once

#include <string>
#include <vector>

namespace deltapipe::testing {

/// Settings that go with so many ranks.
inline std::vector<std::vector<std::string>> meshes_of(int ranks) {
  switch (ranks) {
    case 2:
      return {{"mesh.pipeline=2", "pipeline.teacher=ahead"},
              {"mesh.sequence=2", "memory.recompute=true"},
              {"mesh.data=2", "stage.1.microbatch_sequences=2"}};
    case 4:
      return {{"mesh.pipeline=2", "mesh.sequence=2", "pipeline.schedule=interleaved", "pipeline.chunks=2",
               "pipeline.teacher=ahead"},
              {"mesh.pipeline=4", "pipeline.schedule=zero_bubble", "pipeline.teacher=ahead"},
              {"mesh.pipeline=2", "mesh.data=2", "pipeline.layers=[1, 3]"},
              {"mesh.sequence=2", "mesh.data=2", "mesh.layout=contiguous"}};
    default: return {{}};
  }
}

}  // namespace deltapipe::testing
