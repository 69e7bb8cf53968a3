// Preloaded, it counts the heap allocations that one shared object asks for itself: the calls whose return
// address lies in its code, and not what others allocate (Python's objects, the OpenMP runtime). Or those of
// all.
#define _GNU_SOURCE
#include <link.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

extern void* __libc_malloc(size_t size);
extern void* __libc_calloc(size_t count, size_t size);
extern void* __libc_realloc(void* memory, size_t size);
extern void* __libc_memalign(size_t alignment, size_t size);

static uintptr_t begin, end;
static atomic_long calls;

static int find(struct dl_phdr_info* object, size_t size, void* name) {
  (void)size;
  if (strstr(object->dlpi_name, name) == NULL) return 0;
  for (int i = 0; i < object->dlpi_phnum; ++i) {
    const ElfW(Phdr)* segment = &object->dlpi_phdr[i];
    if (segment->p_type != PT_LOAD || (segment->p_flags & PF_X) == 0) continue;
    begin = object->dlpi_addr + segment->p_vaddr;
    end = begin + segment->p_memsz;
    return 1;
  }
  return 0;
}

/// Watch the loaded object whose path contains `name`; 0 where there is none.
int count_alloc_watch(const char* name) { return dl_iterate_phdr(find, (void*)name); }

/// Watch all of them.
void count_alloc_watch_all(void) { end = UINTPTR_MAX; }

/// Allocations since the program began to watch.
long count_alloc_calls(void) { return calls; }

static void count(void* caller) {
  const uintptr_t at = (uintptr_t)caller;
  if (begin <= at && at < end) ++calls;
}
#define COUNT() count(__builtin_return_address(0))

static void* aligned(size_t alignment, size_t size) { return __libc_memalign(alignment, size); }

void* malloc(size_t size) {
  COUNT();
  return __libc_malloc(size);
}

void* calloc(size_t n, size_t size) {
  COUNT();
  return __libc_calloc(n, size);
}

void* realloc(void* memory, size_t size) {
  COUNT();
  return __libc_realloc(memory, size);
}

void* aligned_alloc(size_t alignment, size_t size) {
  COUNT();
  return aligned(alignment, size);
}

int posix_memalign(void** memory, size_t alignment, size_t size) {
  COUNT();
  *memory = aligned(alignment, size);
  return *memory == NULL ? 12 /* ENOMEM */ : 0;
}

// operator new and new[], plain and aligned, by their mangled names: std::vector calls these.
static void* must(void* memory) {
  if (memory == NULL) abort();
  return memory;
}

void* _Znwm(size_t size) {
  COUNT();
  return must(__libc_malloc(size));
}

void* _Znam(size_t size) {
  COUNT();
  return must(__libc_malloc(size));
}

void* _ZnwmSt11align_val_t(size_t size, size_t alignment) {
  COUNT();
  return must(aligned(alignment, size));
}

void* _ZnamSt11align_val_t(size_t size, size_t alignment) {
  COUNT();
  return must(aligned(alignment, size));
}
