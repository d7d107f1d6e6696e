#include "pipeline/timeline.h"

#include "core/error.h"

#include <algorithm>
#include <cmath>

namespace deltapipe::pipeline {
namespace {

/// How a kind is drawn. The next step's teacher forwards have an entry of their own.
struct Look {
  TaskKind kind;
  int step_offset;
  char letter;
  char filler;
  std::string_view fill;  // SVG colour
  std::string_view ink;   // of the number on it
  std::string_view words;
};
constexpr std::array<Look, 7> looks{{
    {TaskKind::teacher_forward, 0, 'T', '-', "#f0b04a", "#3a2600", "teacher forward"},
    {TaskKind::teacher_forward, 1, 't', '~', "#fbe3b5", "#6b4700", "teacher forward, next step"},
    {TaskKind::forward, 0, 'F', '=', "#4a86c8", "#ffffff", "forward"},
    {TaskKind::backward, 0, 'B', '<', "#3f9a63", "#ffffff", "backward"},
    {TaskKind::backward_input, 0, 'I', '<', "#3f9a63", "#ffffff", "backward, input part"},
    {TaskKind::backward_weight, 0, 'W', '+', "#a9d6b5", "#123d22", "backward, weight part"},
    {TaskKind::align, 0, 'A', '=', "#8b6bb8", "#ffffff", "mixer alignment"},
}};

const Look& look_of(const Task& task) {
  return *std::find_if(looks.begin(), looks.end(), [&](const Look& look) {
    return look.kind == task.kind && look.step_offset == std::min(task.step_offset, 1);
  });
}

std::vector<Look> looks_in(const Simulation& s) {
  std::array<bool, looks.size()> seen{};
  for (const auto& list : s.tasks) {
    for (const TimedTask& t : list) seen[static_cast<std::size_t>(&look_of(t.task) - looks.data())] = true;
  }
  std::vector<Look> used;
  for (std::size_t i = 0; i < looks.size(); ++i) {
    if (seen[i]) used.push_back(looks[i]);
  }
  return used;
}

/// A length of time in the unit that reads best.
struct Unit {
  double seconds;
  std::string_view name;
};
Unit unit_for(double seconds) {
  if (seconds >= 1) return {1, "s"};
  if (seconds >= 1e-3) return {1e-3, "ms"};
  return {1e-6, "us"};
}
std::string in_unit(double seconds) {
  const Unit unit = unit_for(seconds);
  return fmt::format("{:.4g} {}", seconds / unit.seconds, unit.name);
}

std::string bytes_in_words(double bytes) {
  constexpr std::array<std::string_view, 5> units{"B", "KiB", "MiB", "GiB", "TiB"};
  std::size_t u = 0;
  for (; bytes >= 1024 && u + 1 < units.size(); ++u) bytes /= 1024;
  return fmt::format("{:.3g} {}", bytes, units[u]);
}

double idle_share(const Simulation& s, std::size_t rank) {
  return s.step_s > 0 ? std::max(0.0, 1 - (s.busy_s[rank] + s.update_s) / s.step_s) : 0.0;
}

std::string summary(const Simulation& s) {
  return fmt::format("step {}, bubble {:.1f} %, {} ranks, {} microbatches{}", in_unit(s.step_s), 100 * s.bubble,
                     s.ranks, s.microbatches, s.chunks > 1 ? fmt::format(", {} chunks a rank", s.chunks) : "");
}

/// "3" or, with several chunks, "3b": microbatch 3 of the second chunk.
std::string label_of(const Simulation& s, const Task& task) {
  if (s.chunks == 1) return fmt::format("{}", task.microbatch);
  if (task.chunk >= 26) return fmt::format("{}.{}", task.microbatch, task.chunk);
  return fmt::format("{}{}", task.microbatch, static_cast<char>('a' + task.chunk));
}

std::string_view numbers_mean(const Simulation& s) {
  return s.chunks == 1 ? "numbers: microbatch"
                       : "numbers: microbatch, with a letter for the chunk of the rank (a: the first)";
}

}  // namespace

std::string draw_text(const Simulation& s, std::string_view title, int columns) {
  require(columns >= 60, "draw_text: fewer than 60 columns");
  std::string out = fmt::format("{}: {}\n", title, summary(s));
  const int name_width = static_cast<int>(fmt::format("rank {}", s.ranks - 1).size());
  const auto column = [&](double at_s) {
    return s.step_s > 0 ? static_cast<int>(std::lround(at_s / s.step_s * columns)) : 0;
  };
  for (int r = 0; r < s.ranks; ++r) {
    std::string row(static_cast<std::size_t>(columns), ' ');
    for (const TimedTask& t : s.tasks[static_cast<std::size_t>(r)]) {
      const int begin = column(t.start_s), end = std::min(column(t.end_s), columns);
      const Look& look = look_of(t.task);
      const std::string label = label_of(s, t.task);
      for (int i = begin; i < end; ++i) {
        const int letter = i - begin - 1;
        char c = look.filler;
        if (letter < 0) c = look.letter;
        // A number is shown whole or not at all: half of "12" would read as "1".
        else if (end - begin > std::ssize(label) && letter < std::ssize(label))
          c = label[static_cast<std::size_t>(letter)];
        row[static_cast<std::size_t>(i)] = c;
      }
    }
    for (int i = column(s.step_s - s.update_s); i < columns; ++i) row[static_cast<std::size_t>(i)] = '|';
    out += fmt::format("{:>{}} |{}| idle {:4.1f} %\n", fmt::format("rank {}", r), name_width, row,
                       100 * idle_share(s, static_cast<std::size_t>(r)));
  }
  const std::string end = in_unit(s.step_s);
  out += fmt::format("{:>{}} 0{:>{}}\n", "", name_width, end, columns);
  std::string legend;
  for (const Look& look : looks_in(s)) {
    if (!legend.empty()) legend += "   ";
    legend += fmt::format("{}{} {}", look.letter, look.filler, look.words);
  }
  if (s.update_s > 0) legend += "   | update";
  out += fmt::format("{:>{}} {}\n", "", name_width, legend);
  out += fmt::format("{:>{}} {}\n", "", name_width, numbers_mean(s));
  return out;
}

namespace {

std::string escaped(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '&': out += "&amp;"; break;
      case '"': out += "&quot;"; break;
      default: out += c;
    }
  }
  return out;
}

/// A round number of seconds between ticks: 1, 2 or 5 times a power of ten, for about ten ticks.
double tick_step(double length_s) {
  const double raw = length_s / 10;
  const double power = std::pow(10.0, std::floor(std::log10(raw)));
  for (const double factor : {1.0, 2.0, 5.0}) {
    if (factor * power >= raw) return factor * power;
  }
  return 10 * power;
}

}  // namespace

std::string draw_svg(const Simulation& s, std::string_view title) {
  constexpr double left = 70, right = 250, top = 84, row = 30, gap = 6, font = 11;
  // As wide as it takes to write most numbers, within what a browser scrolls comfortably.
  std::size_t most_tasks = 1;
  for (const auto& list : s.tasks) most_tasks = std::max(most_tasks, list.size());
  const double plot = std::clamp(28.0 * static_cast<double>(most_tasks), 700.0, 4000.0);
  const double rows_end = top + s.ranks * (row + gap);
  const double width = left + plot + right, height = rows_end + 48;
  const double scale = s.step_s > 0 ? plot / s.step_s : 0.0;
  std::string out = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" viewBox=\"0 0 {0:.0f} {1:.0f}\" "
      "font-family=\"Helvetica, Arial, sans-serif\" font-size=\"{2}\">\n"
      "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n",
      width, height, font);
  out += fmt::format("<text x=\"{}\" y=\"26\" font-size=\"17\" font-weight=\"bold\">{}</text>\n", left, escaped(title));
  out +=
      fmt::format("<text x=\"{}\" y=\"45\" font-size=\"13\" fill=\"#444444\">{}</text>\n", left, escaped(summary(s)));
  double x = left;
  const auto legend_entry = [&](std::string_view fill, std::string_view words) {
    out += fmt::format("<rect x=\"{:.1f}\" y=\"56\" width=\"14\" height=\"14\" rx=\"2\" fill=\"{}\"/>\n", x, fill);
    out += fmt::format("<text x=\"{:.1f}\" y=\"67\">{}</text>\n", x + 19, words);
    x += 34 + 5.8 * static_cast<double>(words.size());
  };
  for (const Look& look : looks_in(s)) legend_entry(look.fill, look.words);
  if (s.update_s > 0) legend_entry("#9a9a9a", "update");
  legend_entry("#eeeeee", "idle");
  out += fmt::format("<text x=\"{:.1f}\" y=\"67\" fill=\"#444444\">{}</text>\n", x, numbers_mean(s));

  for (int r = 0; r < s.ranks; ++r) {
    const double y = top + r * (row + gap);
    out += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"end\" font-size=\"12\">rank {}</text>\n",
                       left - 8, y + row / 2 + 4, r);
    out += fmt::format("<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{}\" fill=\"#eeeeee\"/>\n", left, y,
                       plot, row);
    for (const TimedTask& t : s.tasks[static_cast<std::size_t>(r)]) {
      const double from = left + t.start_s * scale, length = (t.end_s - t.start_s) * scale;
      const Look& look = look_of(t.task);
      out += fmt::format(
          "<rect x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{}\" fill=\"{}\" stroke=\"#ffffff\" "
          "stroke-width=\"0.6\"><title>{}: {} to {}</title></rect>\n",
          from, y, length, row, look.fill, describe(t.task), in_unit(t.start_s), in_unit(t.end_s));
      const std::string label = label_of(s, t.task);
      if (length >= 6.5 * static_cast<double>(label.size()) + 3) {
        out += fmt::format("<text x=\"{:.2f}\" y=\"{:.1f}\" text-anchor=\"middle\" fill=\"{}\">{}</text>\n",
                           from + length / 2, y + row / 2 + 4, look.ink, label);
      }
    }
    if (s.update_s > 0) {
      out += fmt::format("<rect x=\"{:.2f}\" y=\"{:.1f}\" width=\"{:.2f}\" height=\"{}\" fill=\"#9a9a9a\"/>\n",
                         left + (s.step_s - s.update_s) * scale, y, s.update_s * scale, row);
    }
    const auto i = static_cast<std::size_t>(r);
    const RankPeak& peak = s.peaks[i];
    out += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"10\" fill=\"#444444\">idle {:.1f} %{}</text>\n",
                       left + plot + 8, y + 12, 100 * idle_share(s, i),
                       peak.bytes > 0 ? ", peak " + bytes_in_words(peak.bytes) : "");
    out += fmt::format(
        "<text x=\"{:.1f}\" y=\"{:.1f}\" font-size=\"10\" fill=\"#444444\">at most {} in flight, {} of the teacher "
        "kept</text>\n",
        left + plot + 8, y + 25, peak.in_flight, peak.kept_teacher);
  }
  if (s.step_s > 0) {
    const Unit unit = unit_for(s.step_s);
    const double step = tick_step(s.step_s);
    out += fmt::format("<line x1=\"{:.1f}\" y1=\"{:.1f}\" x2=\"{:.1f}\" y2=\"{:.1f}\" stroke=\"#444444\"/>\n", left,
                       rows_end, left + plot, rows_end);
    for (int i = 0; i * step <= s.step_s * (1 + 1e-9); ++i) {
      const double at = left + i * step * scale;
      out += fmt::format("<line x1=\"{0:.1f}\" y1=\"{1:.1f}\" x2=\"{0:.1f}\" y2=\"{2:.1f}\" stroke=\"#444444\"/>\n", at,
                         rows_end, rows_end + 5);
      out += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{:.6g}</text>\n", at, rows_end + 18,
                         i * step / unit.seconds);
    }
    out += fmt::format(
        "<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">time from the start of the step, {}</text>\n",
        left + plot / 2, rows_end + 36, unit.name);
  }
  out += "</svg>\n";
  return out;
}

}  // namespace deltapipe::pipeline
