#include "pipeline/timeline.h"

#include "core/error.h"
#include "tests/pipeline/testing.h"

#include <algorithm>
#include <sstream>

namespace deltapipe::pipeline {
namespace {

std::vector<std::string> lines_of(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) lines.push_back(line);
  return lines;
}

int count(const std::string& text, const std::string& part) {
  int n = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; at += part.size()) ++n;
  return n;
}

// 12 s in 72 columns: 6 columns a second.
TEST(Timeline, TextByHand) {
  CostModel cost = testing::even_costs(2, 0, 1, 2);
  cost.update_s = 3;
  const auto lines = lines_of(draw_text(simulate(one_f_one_b(2, 2), cost), "two ranks", 72));
  ASSERT_EQ(lines.size(), 6u);
  EXPECT_EQ(lines[0], "two ranks: step 12 s, bubble 25.0 %, 2 ranks, 2 microbatches");
  EXPECT_EQ(lines[1], "rank 0 |F0====F1====            B0<<<<<<<<<<      B1<<<<<<<<<<||||||||||||||||||| idle 25.0 %");
  EXPECT_EQ(lines[2], "rank 1 |      F0====B0<<<<<<<<<<F1====B1<<<<<<<<<<            ||||||||||||||||||| idle 25.0 %");
  EXPECT_EQ(lines[3], "       0" + std::string(68, ' ') + "12 s");
  EXPECT_EQ(lines[4], "       F= forward   B< backward   | update");
  EXPECT_EQ(lines[5], "       numbers: microbatch");
}

TEST(Timeline, EveryKindShowsAndRowsAreEven) {
  const CostModel cost = testing::afm_costs(8);
  for (int kind = 0; kind < 4; ++kind) {
    const ScheduleRequest q{static_cast<ScheduleKind>(kind), 4, kind == 1 ? 2 : 1, 12, Teacher::ahead, 0};
    const Schedule schedule = make_schedule(q, kind == 1 ? cost : testing::afm_costs(4));
    const Simulation s = simulate(schedule, kind == 1 ? cost : testing::afm_costs(4));
    const std::string text = draw_text(s, testing::describe(q), 200);
    const auto lines = lines_of(text);
    ASSERT_EQ(lines.size(), 4u + 4u);
    const std::string letters[] = {"TtFB", "TtFB", "TtFIW", "TtA"};
    for (std::size_t r = 1; r <= 4; ++r) {
      EXPECT_EQ(lines[r].find('|', 8), 208u);
    }
    for (const char letter : letters[kind]) {
      EXPECT_TRUE(std::any_of(lines.begin() + 1, lines.begin() + 5,
                              [&](const std::string& line) { return line.find(letter, 8) < 208; }))
          << letter << "\n"
          << text;
    }
    EXPECT_TRUE(std::all_of(text.begin(), text.end(), [](char c) { return c == '\n' || (c >= ' ' && c <= '~'); }));
    const std::string svg = draw_svg(s, testing::describe(q));
    int tasks = 0;
    for (const auto& list : s.tasks) tasks += static_cast<int>(list.size());
    EXPECT_EQ(count(svg, "<title>"), tasks);
    EXPECT_EQ(count(svg, "<text "), count(svg, "</text>"));
    EXPECT_EQ(svg.rfind("</svg>\n"), svg.size() - 7);
    EXPECT_EQ(count(svg, "nan") + count(svg, "inf,") + count(svg, "\"-"), 0);
  }
}

TEST(Timeline, TitlesAreEscaped) {
  const Simulation s = simulate(one_f_one_b(1, 1), testing::afm_costs(1));
  const std::string svg = draw_svg(s, "a < b & \"c\"");
  EXPECT_NE(svg.find("a &lt; b &amp; &quot;c&quot;"), std::string::npos);
}

TEST(Timeline, NoCostsNoTime) {  // nothing to draw, nothing to divide by
  const Simulation s = simulate(one_f_one_b(2, 2), CostModel::uniform(2, {}));
  EXPECT_NE(draw_text(s, "none", 60).find("step 0 us"), std::string::npos);
  EXPECT_NE(draw_svg(s, "none").find("</svg>"), std::string::npos);
  EXPECT_THROW(draw_text(s, "narrow", 59), InternalError);
}

}  // namespace
}  // namespace deltapipe::pipeline
