// How many send buffers a schedule needs.
#pragma once

#include "pipeline/schedule.h"

namespace deltapipe::pipeline {

/// The schedule's rule is that sends never block; real ones do: a message leaves its buffer when the receiving task has
/// begun. What a task sends lies in memory that outlives the message anyway, since the receiver's backward must come
/// back first, but for two kinds: gradients, and the teacher's hidden states in mixer alignment. They are copied into
/// buffers, used in turn.
MessageKind buffered_kind(const Schedule& schedule);

/// The smallest number of buffers a rank (the same on all) with which every list runs to its end although a send waits
/// for a buffer to be free. Found by running the lists, prologue and last step included; at least 1 where anything of
/// that kind is sent, else 0.
int send_buffers(const Schedule& schedule);

}  // namespace deltapipe::pipeline
