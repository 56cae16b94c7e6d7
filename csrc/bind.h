// What the files of the bindings share: each defines the ops of a family.
#pragma once

#include <nanobind/nanobind.h>

#include "cuda/ops.h"
#include "groups.h"

namespace commrt {

using Address = std::uintptr_t;
using Index = std::int64_t;

constexpr Index kGrainElements = 32 * 1024;  // a piece of work stays in the second-level cache

// Where an op runs, as commrt/ops/native says it: on so many threads of the CPU, or on a cuda::Queue.
struct ThreadCount {
  int count;
};

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

struct GroupsArg : Groups {
  GroupsArg(Address ends, int count) : Groups{at<const std::int64_t>(ends), count} {}
};

void bind_dither(nanobind::module_& m);
void bind_rans(nanobind::module_& m);
void bind_polar(nanobind::module_& m);
void bind_sources(nanobind::module_& m);
void bind_updates(nanobind::module_& m);

}  // namespace commrt
