#pragma once

#include <torch/headeronly/util/Exception.h>

// Raises RuntimeError in Python. The message names the argument, what came and what is needed:
//   KD_CHECK(x.dim() == 3, "x must be [groups, rows, features], got ", x.dim(), " axes");
#define KD_CHECK(cond, ...)            \
  do {                                 \
    STD_TORCH_CHECK(cond, __VA_ARGS__) \
  } while (0)
