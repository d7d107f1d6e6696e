// Placing the teacher's forwards into the bubbles of a student's schedule.
//
// The teacher's forwards of a rank form an endless stream: those of one step in the order of the student's forwards,
// then the next step's. Between two steps every rank executes as many of them as a step has, only not from the
// beginning of the stream: rank r starts a step a(r) forwards ahead. One try
// 1. takes some a(r), larger towards the first rank, because the teacher too passes from rank to rank;
// 2. plays a step (Placer). The student runs as soon as it can. Where a rank would idle, it takes the next forward of
// its
//    stream (a slot), if that ends before the latest start of the student's next task from which a step of the aimed
//    length is still possible. A slot goes before a student task that could start only to keep pace with the student,
//    when there is more teacher than idle time, or during the warm-up, where the student has time to spare;
// 3. lowers the a(r) as far as the times of this step allow (ranks_ahead). Since these times respect all dependencies,
// the
//    resulting lists cannot deadlock, whatever the real costs.
// Tries differ in a(r) and aims; each is simulated and the best kept. Ahead by more than a step is never tried: with
// 1f1b that is what remains of the bubble, for the last rank idles at both ends of a step, so its last slots are late,
// and every rank before it must have been through them.
#include "core/error.h"
#include "pipeline/execution.h"
#include "pipeline/generators.h"

#include <algorithm>
#include <limits>
#include <queue>

namespace deltapipe::pipeline {
namespace {

constexpr double never = std::numeric_limits<double>::infinity();
/// Steps within this share of each other count as equally long; the cost model is not more precise than that.
constexpr double equal_steps = 0.002;

struct Node {  // a task of the student
  Task task;
  int rank = 0;
  double seconds = 0;
  double tail_s = 0;  // from its start to the end of the step, if nothing but the student ran
  std::array<int, 2> needs{-1, -1};
  std::vector<int> dependents;
};

struct StudentGraph {
  std::vector<Node> nodes;                  // rank by rank, in the order of the lists
  std::vector<int> first;                   // [rank + 1]
  std::vector<std::pair<int, int>> stream;  // (chunk, microbatch) in the order of the student's forwards
  std::vector<int> place_in_stream;         // [chunk * microbatches + microbatch]
  double length_s = 0;                      // of a step without teacher
  int warmup(int rank) const {              // tasks before the first that is no forward
    int n = 0;
    const int size = first[static_cast<std::size_t>(rank) + 1] - first[static_cast<std::size_t>(rank)];
    while (n < size && node(rank, n).task.kind == TaskKind::forward) ++n;
    return n;
  }
  const Node& node(int rank, int place) const {
    return nodes[static_cast<std::size_t>(first[static_cast<std::size_t>(rank)] + place)];
  }
};

StudentGraph make_graph(const Schedule& s, const CostModel& cost) {
  StudentGraph g;
  std::vector<int> id(static_cast<std::size_t>(task_kinds * s.stages() * s.microbatches), -1);
  const auto id_of = [&](int rank, const Task& t) -> int& {
    return id[static_cast<std::size_t>(
        (static_cast<int>(t.kind) * s.stages() + s.stage_of(rank, t.chunk)) * s.microbatches + t.microbatch)];
  };
  for (int r = 0; r < s.ranks; ++r) {
    g.first.push_back(static_cast<int>(g.nodes.size()));
    for (const Task& task : s.tasks[static_cast<std::size_t>(r)]) {
      id_of(r, task) = static_cast<int>(g.nodes.size());
      g.nodes.push_back({task, r, cost.seconds(s, r, task), 0, {-1, -1}, {}});
    }
  }
  g.first.push_back(static_cast<int>(g.nodes.size()));
  g.place_in_stream.resize(static_cast<std::size_t>(s.chunks * s.microbatches));
  for (const Task& task : s.tasks.front()) {
    if (task.kind != TaskKind::forward && task.kind != TaskKind::align) continue;
    g.place_in_stream[static_cast<std::size_t>(task.chunk * s.microbatches + task.microbatch)] =
        static_cast<int>(g.stream.size());
    g.stream.emplace_back(task.chunk, task.microbatch);
  }
  std::vector<int> open(g.nodes.size(), 0);  // needs not yet met, the place in the list included
  for (int n = 0; n < std::ssize(g.nodes); ++n) {
    Node& node = g.nodes[static_cast<std::size_t>(n)];
    std::size_t count = 0;
    for (const Dependency& needed : dependencies(s, node.rank, node.task)) {
      if (needed.task.kind == TaskKind::teacher_forward) continue;
      const int other = id_of(needed.rank, needed.task);
      node.needs[count++] = other;
      g.nodes[static_cast<std::size_t>(other)].dependents.push_back(n);
    }
    open[static_cast<std::size_t>(n)] =
        static_cast<int>(count) + (n > g.first[static_cast<std::size_t>(node.rank)] ? 1 : 0);
  }
  const auto follower = [&](int n) {  // in the rank's list, or -1
    const int rank = g.nodes[static_cast<std::size_t>(n)].rank;
    return n + 1 < g.first[static_cast<std::size_t>(rank) + 1] ? n + 1 : -1;
  };
  std::vector<int> order;
  for (int n = 0; n < std::ssize(open); ++n) {
    if (open[static_cast<std::size_t>(n)] == 0) order.push_back(n);
  }
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto meet = [&](int n) {
      if (n >= 0 && --open[static_cast<std::size_t>(n)] == 0) order.push_back(n);
    };
    for (const int n : g.nodes[static_cast<std::size_t>(order[i])].dependents) meet(n);
    meet(follower(order[i]));
  }
  require(order.size() == g.nodes.size(), "with_teacher_ahead: the student's schedule deadlocks");
  for (auto n = order.rbegin(); n != order.rend(); ++n) {
    Node& node = g.nodes[static_cast<std::size_t>(*n)];
    double rest = 0;
    for (const int d : node.dependents) {
      const Node& other = g.nodes[static_cast<std::size_t>(d)];
      rest = std::max(rest, other.tail_s + (other.rank == node.rank ? 0.0 : cost.message_s));
    }
    if (const int f = follower(*n); f >= 0) rest = std::max(rest, g.nodes[static_cast<std::size_t>(f)].tail_s);
    node.tail_s = node.seconds + rest;
    g.length_s = std::max(g.length_s, node.tail_s);
  }
  return g;
}

/// What a placement is tried with.
struct Habits {
  std::vector<int> ahead;  // [rank]: teacher forwards of the stream done at the start of the step
  double aim_s = 0;        // length of the step that slots must leave possible
  double early_aim_s =
      0;  // the same for slots taken before a student task of the warm-up that could start: negative: none
  int kept_limit = 0;
};

struct Slot {
  int place;  // student tasks of the rank before it
  double start_s, end_s;
};
struct Placement {
  std::vector<std::vector<Slot>> slots;  // [rank]
  double length_s = 0;
};

bool consumes_teacher(TaskKind kind) {
  return kind == TaskKind::backward || kind == TaskKind::backward_input || kind == TaskKind::align;
}
bool starts_microbatch(TaskKind kind) { return kind == TaskKind::forward || kind == TaskKind::align; }

/// Plays one step and decides, whenever a rank is free, between the student's next task, a slot and waiting.
class Placer {
 public:
  Placer(const Schedule& s, const StudentGraph& g, const CostModel& cost) : s_(s), g_(g), cost_(cost) {
    shortest_s_ = g.length_s;
    for (int r = 0; r < s.ranks; ++r) {
      warmup_.push_back(g.warmup(r));
      double busy = 0, teacher = 0;
      for (int i = 0; i < nodes_of(r); ++i) busy += g.node(r, i).seconds;
      for (int c = 0; c < s.chunks; ++c) {
        teacher += s.microbatches * cost.stages[static_cast<std::size_t>(s.stage_of(r, c))].teacher_forward_s;
      }
      shortest_s_ = std::max(shortest_s_, busy + teacher);
      const double idle = g.length_s - busy;
      const double left = teacher > 0 ? size() * std::max(0.0, 1 - idle / teacher) : 0.0;
      pace_.push_back(left / std::max(1, size() - warmup_.back()));
    }
  }
  /// No step can be shorter: the student alone, or all the work of the busiest rank.
  double shortest_s() const { return shortest_s_; }

  /// Empty when the limit leaves no way on, or the step would take longer than `give_up_s`.
  std::optional<Placement> place(const Habits& habits, double give_up_s) {
    habits_ = &habits;
    const auto ranks = static_cast<std::size_t>(s_.ranks);
    placement_ = {};
    placement_.slots.resize(ranks);
    start_s_.assign(g_.nodes.size(), never);
    state_.assign(ranks, {});
    for (std::size_t r = 0; r < ranks; ++r) state_[r].kept = habits.ahead[r];
    events_ = {};
    for (int r = 0; r < s_.ranks; ++r) events_.emplace(0.0, r);
    double now = 0;
    for (;;) {
      while (!events_.empty()) {
        const Event event = events_.top();
        events_.pop();
        now = event.first;
        if (now > give_up_s) return std::nullopt;
        if (now >= state_[static_cast<std::size_t>(event.second)].free_at_s) decide(event.second, now);
      }
      if (all_done()) break;
      if (!force_slot(now)) return std::nullopt;
    }
    for (const State& state : state_) placement_.length_s = std::max(placement_.length_s, state.free_at_s);
    return std::move(placement_);
  }

 private:
  using Event = std::pair<double, int>;  // (time, rank that may decide)
  struct State {                         // of a rank
    double free_at_s = 0;
    int next = 0;      // place of the student's next task
    int forwards = 0;  // begun
    int kept = 0;      // teacher forwards done or carried, and not yet consumed
  };

  int size() const { return s_.chunks * s_.microbatches; }
  int nodes_of(int rank) const {
    return g_.first[static_cast<std::size_t>(rank) + 1] - g_.first[static_cast<std::size_t>(rank)];
  }
  int slots_of(int rank) const { return static_cast<int>(placement_.slots[static_cast<std::size_t>(rank)].size()); }
  bool student_done(int rank) const { return state_[static_cast<std::size_t>(rank)].next == nodes_of(rank); }
  bool all_done() const {
    for (int r = 0; r < s_.ranks; ++r) {
      if (!student_done(r) || slots_of(r) < size()) return false;
    }
    return true;
  }

  /// End of the forward at `index` of the rank's stream.
  double teacher_end_s(int rank, int index) const {
    const int slot = index - habits_->ahead[static_cast<std::size_t>(rank)];
    if (slot < 0) return 0;
    return slot < slots_of(rank)
               ? placement_.slots[static_cast<std::size_t>(rank)][static_cast<std::size_t>(slot)].end_s
               : never;
  }
  int stage_of_index(int rank, int index) const {
    return s_.stage_of(rank, g_.stream[static_cast<std::size_t>(index % size())].first);
  }
  int index_of(int chunk, int microbatch, int step) const {
    return step * size() + g_.place_in_stream[static_cast<std::size_t>(chunk * s_.microbatches + microbatch)];
  }
  /// When the input of the rank's next teacher forward has arrived.
  double slot_ready_s(int rank) const {
    const int index = habits_->ahead[static_cast<std::size_t>(rank)] + slots_of(rank);
    const int stage = stage_of_index(rank, index);
    if (stage == 0) return 0;
    const int other = s_.rank_of(stage - 1);
    const int microbatch = g_.stream[static_cast<std::size_t>(index % size())].second;
    const int wanted = index_of(s_.chunk_of(stage - 1), microbatch, index / size());
    return teacher_end_s(other, wanted) + (other == rank ? 0.0 : cost_.message_s);
  }
  double next_slot_s(int rank) const {  // its seconds
    const int index = habits_->ahead[static_cast<std::size_t>(rank)] + slots_of(rank);
    return cost_.stages[static_cast<std::size_t>(stage_of_index(rank, index))].teacher_forward_s;
  }

  /// When all that a task needs of the student has arrived; never, as long as some of it has not begun.
  double student_ready_s(const Node& node) const {
    double ready = 0;
    for (const int needed : node.needs) {
      if (needed < 0) continue;
      const Node& other = g_.nodes[static_cast<std::size_t>(needed)];
      ready = std::max(ready, start_s_[static_cast<std::size_t>(needed)] + other.seconds +
                                  (other.rank == node.rank ? 0.0 : cost_.message_s));
    }
    return ready;
  }
  bool lacks_teacher(const Node& node) const {
    if (!consumes_teacher(node.task.kind) &&
        !(node.task.kind == TaskKind::forward && s_.is_last(s_.stage_of(node.rank, node.task.chunk)))) {
      return false;
    }
    return teacher_end_s(node.rank, index_of(node.task.chunk, node.task.microbatch, 0)) == never;
  }

  void decide(int rank, double now) {
    State& state = state_[static_cast<std::size_t>(rank)];
    const bool slot_left = slots_of(rank) < size() && state.kept < habits_->kept_limit;
    const double slot_ready = slot_left ? slot_ready_s(rank) : never;
    if (student_done(rank)) {
      if (slot_ready <= now) {
        take_slot(rank, now);
      } else if (slot_ready < never) {
        events_.emplace(slot_ready, rank);
      }
      return;
    }
    const Node& node = g_.node(rank, state.next);
    const bool lacks = lacks_teacher(node);
    const double ready = lacks ? never : student_ready_s(node);
    bool slot = slot_ready <= now;
    if (slot && !lacks) {
      const double end = now + next_slot_s(rank);
      slot = end <= habits_->aim_s - node.tail_s;
      if (slot && ready <= now) {  // not idle: only to keep pace
        const int steady = state.forwards + 1 - warmup_[static_cast<std::size_t>(rank)];
        slot = starts_microbatch(node.task.kind) &&
               (steady <= 0 ? end <= habits_->early_aim_s - node.tail_s
                            : slots_of(rank) < pace_[static_cast<std::size_t>(rank)] * steady);
      }
    }
    if (slot) {
      take_slot(rank, now);
    } else if (ready <= now) {
      run_student(rank, now);
    } else {  // what it waits for wakes the rank, or has told already when it will be there
      const double wake = std::min(ready, slot_ready > now ? slot_ready : never);
      if (wake < never) events_.emplace(wake, rank);
    }
  }
  void take_slot(int rank, double now) {
    State& state = state_[static_cast<std::size_t>(rank)];
    const int index = habits_->ahead[static_cast<std::size_t>(rank)] + slots_of(rank);
    const int stage = stage_of_index(rank, index);
    const double end = now + next_slot_s(rank);
    placement_.slots[static_cast<std::size_t>(rank)].push_back({state.next, now, end});
    ++state.kept;
    state.free_at_s = end;
    events_.emplace(end, rank);
    if (!s_.is_last(stage) && s_.rank_of(stage + 1) != rank) {
      events_.emplace(end + cost_.message_s, s_.rank_of(stage + 1));
    }
  }
  void run_student(int rank, double now) {
    State& state = state_[static_cast<std::size_t>(rank)];
    const int n = g_.first[static_cast<std::size_t>(rank)] + state.next;
    const Node& node = g_.nodes[static_cast<std::size_t>(n)];
    start_s_[static_cast<std::size_t>(n)] = now;
    state.free_at_s = now + node.seconds;
    state.forwards += starts_microbatch(node.task.kind) ? 1 : 0;
    state.kept -= consumes_teacher(node.task.kind) ? 1 : 0;
    ++state.next;
    events_.emplace(state.free_at_s, rank);
    for (const int d : node.dependents) {
      const int other = g_.nodes[static_cast<std::size_t>(d)].rank;
      if (other != rank) events_.emplace(state.free_at_s + cost_.message_s, other);
    }
  }
  /// No rank can go on without breaking its habit: the first one that can take a slot does.
  bool force_slot(double now) {
    for (int r = 0; r < s_.ranks; ++r) {
      if (slots_of(r) < size() && state_[static_cast<std::size_t>(r)].kept < habits_->kept_limit &&
          slot_ready_s(r) < never) {
        take_slot(r, std::max(now, slot_ready_s(r)));
        return true;
      }
    }
    return false;
  }

  const Schedule& s_;
  const StudentGraph& g_;
  const CostModel& cost_;
  double shortest_s_ = 0;
  std::vector<int> warmup_;  // [rank]: forwards before the first other task
  std::vector<double>
      pace_;  // [rank]: slots a forward after the warm-up, of those that find no room where the student idles
  const Habits* habits_ = nullptr;  // during place()
  Placement placement_;
  std::vector<double> start_s_;  // [node]
  std::vector<State> state_;
  std::priority_queue<Event, std::vector<Event>, std::greater<>> events_;
};

/// The first rank waits for the last one where chunks follow each other, so that one pass from the last rank to the
/// first may not do; more than these have not been worth their time.
constexpr int most_passes = 8;

/// Question 2: how far ahead each rank is; empty when it would be more than a whole step.
std::vector<int> ranks_ahead(const Schedule& s, const StudentGraph& g, const CostModel& cost, const Placement& p) {
  const int size = s.chunks * s.microbatches;
  std::vector<int> ahead(static_cast<std::size_t>(s.ranks), 0);
  for (int r = 0; r < s.ranks; ++r) {  // what the rank's own student needs
    const auto& slots = p.slots[static_cast<std::size_t>(r)];
    std::size_t before = 0;
    const int nodes = g.first[static_cast<std::size_t>(r) + 1] - g.first[static_cast<std::size_t>(r)];
    for (int i = 0; i < nodes; ++i) {
      while (before < slots.size() && slots[before].place <= i) ++before;
      const Task& task = g.node(r, i).task;
      for (const Dependency& needed : dependencies(s, r, task)) {
        if (needed.task.kind != TaskKind::teacher_forward) continue;
        const int at = g.place_in_stream[static_cast<std::size_t>(task.chunk * s.microbatches + task.microbatch)];
        int& own = ahead[static_cast<std::size_t>(r)];
        own = std::max(own, at + 1 - static_cast<int>(before));
      }
    }
  }
  bool changed = true;
  for (int pass = 0; changed; ++pass) {  // what its slots need of the stage before
    if (pass == most_passes) return {};
    changed = false;
    for (int r = s.ranks - 1; r >= 0; --r) {
      for (int j = 0; j < size; ++j) {
        const int index = ahead[static_cast<std::size_t>(r)] + j;
        const auto [chunk, microbatch] = g.stream[static_cast<std::size_t>(index % size)];
        const int stage = s.stage_of(r, chunk);
        if (stage == 0) continue;
        const int other = s.rank_of(stage - 1);
        const int at = g.place_in_stream[static_cast<std::size_t>(s.chunk_of(stage - 1) * s.microbatches + microbatch)];
        const double start = p.slots[static_cast<std::size_t>(r)][static_cast<std::size_t>(j)].start_s -
                             (other == r ? 0.0 : cost.message_s);
        const auto& slots = p.slots[static_cast<std::size_t>(other)];
        const auto ended = std::upper_bound(slots.begin(), slots.end(), start,
                                            [](double t, const Slot& slot) { return t < slot.end_s; });
        const int wanted = index / size * size + at + 1 - static_cast<int>(ended - slots.begin());
        int& theirs = ahead[static_cast<std::size_t>(other)];
        if (wanted > theirs) {
          theirs = wanted;
          changed = true;
        }
      }
    }
    if (*std::max_element(ahead.begin(), ahead.end()) > size) return {};
  }
  return ahead;
}

/// The most teacher forwards that a rank keeps, for each rank.
std::vector<int> most_kept(const Schedule& s, const StudentGraph& g, const Placement& p,
                           const std::vector<int>& ahead) {
  std::vector<int> most = ahead;
  for (int r = 0; r < s.ranks; ++r) {
    const auto& slots = p.slots[static_cast<std::size_t>(r)];
    int kept = ahead[static_cast<std::size_t>(r)];
    std::size_t j = 0;
    const int nodes = g.first[static_cast<std::size_t>(r) + 1] - g.first[static_cast<std::size_t>(r)];
    for (int i = 0; i <= nodes; ++i) {
      for (; j < slots.size() && slots[j].place == i; ++j) ++kept;
      most[static_cast<std::size_t>(r)] = std::max(most[static_cast<std::size_t>(r)], kept);
      if (i < nodes && consumes_teacher(g.node(r, i).task.kind)) --kept;
    }
  }
  return most;
}

Schedule merge(const Schedule& student, const StudentGraph& g, const Placement& p, const std::vector<int>& ahead) {
  Schedule schedule = student;
  schedule.teacher = Teacher::ahead;
  const int size = student.chunks * student.microbatches;
  for (int r = 0; r < student.ranks; ++r) {
    auto& list = schedule.tasks[static_cast<std::size_t>(r)];
    list.clear();
    int index = ahead[static_cast<std::size_t>(r)];
    for (int i = 0; i < index; ++i) {
      ++schedule.ahead[static_cast<std::size_t>(student.stage_of(r, g.stream[static_cast<std::size_t>(i)].first))];
    }
    const auto& tasks = student.tasks[static_cast<std::size_t>(r)];
    const auto& slots = p.slots[static_cast<std::size_t>(r)];
    std::size_t j = 0;
    for (int i = 0; i <= std::ssize(tasks); ++i) {
      for (; j < slots.size() && slots[j].place == i; ++j, ++index) {
        const auto [chunk, microbatch] = g.stream[static_cast<std::size_t>(index % size)];
        list.push_back({TaskKind::teacher_forward, microbatch, chunk, index / size});
      }
      if (i < std::ssize(tasks)) list.push_back(tasks[static_cast<std::size_t>(i)]);
    }
  }
  return schedule;
}

double steady_step_s(const Schedule& schedule, const CostModel& cost) {
  const TaskLists first = prologue(schedule);
  const auto run = play(schedule, {{0, false, &first}, {0, true, &schedule.tasks}, {1, true, &schedule.tasks}}, cost);
  return run[2].end_s - run[2].begin_s;
}

int inline_kept(const Schedule& in_line) {
  int most = 0;
  for (const auto& list : in_line.tasks) {
    int kept = 0;
    for (const Task& task : list) {
      kept += task.kind == TaskKind::teacher_forward ? 1 : 0;
      most = std::max(most, kept);
      kept -= consumes_teacher(task.kind) ? 1 : 0;
    }
  }
  return most;
}

}  // namespace

Schedule with_teacher_ahead(const Schedule& student, const CostModel& cost, int kept_limit) {
  require(student.teacher == Teacher::none, "with_teacher_ahead: the schedule has a teacher already");
  require(std::ssize(cost.stages) == student.stages(), "with_teacher_ahead: the cost model is not one entry a stage");
  require(kept_limit >= 0, "with_teacher_ahead: kept_limit is negative");
  Schedule base = student;
  base.teacher = Teacher::ahead;  // so that dependencies() includes the teacher
  base.name += ", teacher ahead";
  Schedule best = with_teacher_inline(student);
  const int inline_most = inline_kept(best);
  best.name = base.name;
  best.teacher = Teacher::ahead;
  const double inline_s = steady_step_s(best, cost);
  double shortest_seen_s = inline_s;
  int best_kept = inline_most;
  const int size = student.chunks * student.microbatches;
  const int limit = kept_limit == 0 ? 2 * size : std::max(kept_limit, inline_most);

  const StudentGraph graph = make_graph(base, cost);
  Placer placer(base, graph, cost);
  const auto consider = [&](const Habits& habits) {
    const auto placement = placer.place(habits, shortest_seen_s * (1 + equal_steps));
    if (!placement) return;
    std::vector<int> ahead = ranks_ahead(base, graph, cost, *placement);
    if (ahead.empty()) ahead = habits.ahead;
    const std::vector<int> kept = most_kept(base, graph, *placement, ahead);
    const int most = *std::max_element(kept.begin(), kept.end());
    if (most > limit) return;
    Schedule candidate = merge(base, graph, *placement, ahead);
    const double step = steady_step_s(candidate, cost);
    const bool faster = step < shortest_seen_s * (1 - equal_steps);
    const bool smaller = step < shortest_seen_s * (1 + equal_steps) && most < best_kept;
    if (step > inline_s || (!faster && !smaller)) return;
    best = std::move(candidate);
    best_kept = most;
    shortest_seen_s = std::min(shortest_seen_s, step);
  };
  // Values that between them covered the best of finer grids over 40 mixed cases (ranks, microbatches, uneven costs).
  constexpr int levels = 16;        // tries for how far the last rank is ahead
  for (const int slope : {1, 2}) {  // how many more each rank before it
    for (int level = 0; level <= levels; ++level) {
      const int least = level * size / levels;
      if (level > 0 && least == (level - 1) * size / levels) continue;
      Habits habits;
      habits.kept_limit = limit;
      for (int r = 0; r < student.ranks; ++r) {
        habits.ahead.push_back(std::min({size, limit, least + slope * (student.ranks - 1 - r)}));
      }
      for (const double stretch : {0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05, 0.07, 0.1, 0.15, 0.2}) {
        habits.aim_s = placer.shortest_s() * (1 + stretch);
        if (habits.aim_s > shortest_seen_s) break;  // leaves room for a step longer than one found already
        for (const double early : {-1.0, 0.98, 1.0}) {
          habits.early_aim_s = placer.shortest_s() * early;
          consider(habits);
        }
      }
    }
  }
  return best;
}

}  // namespace deltapipe::pipeline
