// A simulated step as a picture: one row a rank, time from left to right.
#pragma once

#include "pipeline/simulator.h"

#include <string>
#include <string_view>

namespace deltapipe::pipeline {

/// ASCII, `columns` wide (at least 60) apart from the rows' names. A task begins with the letter of its kind and its
/// microbatch, as far as they fit, and is filled with its kind's filler; idle time is blank, and a task shorter than
/// half a column may not show. The legend follows.
std::string draw_text(const Simulation& simulation, std::string_view title, int columns = 160);

/// A whole SVG document: a colour a kind, microbatch numbers where they fit, an axis with its unit, a legend, and for
/// every rank its idle share and peaks.
std::string draw_svg(const Simulation& simulation, std::string_view title);

}  // namespace deltapipe::pipeline
