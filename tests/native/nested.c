// A call from inside a parallel region, as a step that another OpenMP program takes.
#include <omp.h>

/// Calls f by one thread of a region of two. With `levels` of active regions allowed, one more region may get
/// fewer threads than it asks for. Returns the threads that the outer region had.
int call_nested(void (*f)(void), int levels) {
  const int before = omp_get_max_active_levels();
  omp_set_max_active_levels(levels);
  int outer = 0;
#pragma omp parallel num_threads(2)
#pragma omp single
  {
    outer = omp_get_num_threads();
    f();
  }
  omp_set_max_active_levels(before);
  return outer;
}
