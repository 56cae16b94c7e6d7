// Neighbouring parts of a flat vector, told by where each of them ends.
#pragma once

#include "ops.h"

namespace commrt {

// Ends ascend, and the last group has all that is left. Other ends make other groups of the same
// vector, never ones that are not in it.
struct Groups {
  const std::int64_t* ends;
  int count;  // at least 1
};

COMMRT_HD int group_of(const Groups& groups, std::int64_t element) {
  int low = 0, high = groups.count - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (element < groups.ends[middle]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// Of an element that is behind those of `group`, or one of them.
COMMRT_HD int next_group(const Groups& groups, int group, std::int64_t element) {
  while (group < groups.count - 1 && element >= groups.ends[group]) ++group;
  return group;
}

// Of a group's elements from `begin` to `end`, which others may follow.
COMMRT_HD std::int64_t part_end(const Groups& groups, int group, std::int64_t begin,
                                std::int64_t end) {
  if (group == groups.count - 1) return end;
  const std::int64_t last = groups.ends[group];
  return last < begin ? begin : last < end ? last : end;
}

// Call body(group, begin, end) for each part of [begin, end) that is of one group.
template <typename Body>
COMMRT_HOST void for_each_part(const Groups& groups, std::int64_t begin, std::int64_t end,
                               Body body) {
  for (int group = group_of(groups, begin); begin < end; ++group) {
    const std::int64_t until = part_end(groups, group, begin, end);
    if (until > begin) body(group, begin, until);
    begin = until;
  }
}

}  // namespace commrt
