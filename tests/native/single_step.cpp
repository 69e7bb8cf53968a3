// Every instruction of a step, by the processor's trap flag: exact, on every instruction set that runs here,
// with no tool but the compiler.
//
//   single_step TARGET FAMILY KIND SIZE ROW...
//
// One layer of SIZE float32 elements, one worker, one row of hyper-parameters, and one item: `plain`,
// `whole`, or `scan` before a plain one. Prints a line for
//   each array: its name, address and bytes;
//   each function of the rule: arithmetic and choices of one element, and states read, by running the rule's
//     own text on values that count;
//   each instruction of the program that the second of two steps executed: its address, how often, and the
//     general registers before its last execution, which say what its memory operand was. Those of libraries
//     count at the address where the program begins.
#include <signal.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cpu/launch.h"

#define DK_ARCH counted  // the rules' text, to be run on values that count
#include "rules/all.h"

extern "C" const char __executable_start, etext;  // the linker's

namespace {

// --- the trap

constexpr int kRegisters[] = {REG_RAX, REG_RBX, REG_RCX, REG_RDX, REG_RSI, REG_RDI, REG_RBP, REG_RSP,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

struct Visits {
  const char* instruction;
  long count;
  greg_t registers[std::size(kRegisters)];
};
Visits visits[1 << 16];  // a handler allocates nothing
int known = 0;
int* place;  // by the instruction's offset: where its visits are, from 1

/// Before each instruction while the trap flag is set.
void on_trap(int, siginfo_t*, void* context) {
  const greg_t* const at = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* instruction = reinterpret_cast<const char*>(at[REG_RIP]);
  if (instruction < &__executable_start || instruction >= &etext) instruction = &__executable_start;
  int& at_visits = place[instruction - &__executable_start];
  if (at_visits == 0) {
    if (known == static_cast<int>(std::size(visits))) std::abort();
    at_visits = ++known;
  }
  Visits& here = visits[at_visits - 1];
  here.instruction = instruction;
  ++here.count;
  for (std::size_t i = 0; i < std::size(kRegisters); ++i) here.registers[i] = at[kRegisters[i]];
}

void flip_trap_flag() {  // the stack below its pointer may hold a leaf function's variables
  asm volatile("lea -128(%%rsp), %%rsp; pushfq; xorq $0x100, (%%rsp); popfq; lea 128(%%rsp), %%rsp" ::
                   : "memory", "cc");
}

// --- what a formula needs

/// A value that counts what is done to it: arithmetic, and choices between values (a comparison and what it
/// decides).
struct Counted {
  static inline int arithmetic = 0, choices = 0;
  double value = 0;

  Counted() = default;
  Counted(double x) : value(x) {}

  static Counted computed(double x) {
    ++arithmetic;
    return x;
  }
  static bool chosen(bool x) {
    ++choices;
    return x;
  }
  friend Counted operator+(Counted a, Counted b) { return computed(a.value + b.value); }
  friend Counted operator-(Counted a, Counted b) { return computed(a.value - b.value); }
  friend Counted operator*(Counted a, Counted b) { return computed(a.value * b.value); }
  friend Counted operator/(Counted a, Counted b) { return computed(a.value / b.value); }
  friend Counted root(Counted a) { return computed(std::sqrt(a.value)); }
  friend bool operator<(Counted a, Counted b) { return chosen(a.value < b.value); }
  friend bool operator>(Counted a, Counted b) { return chosen(a.value > b.value); }
  friend bool operator!=(Counted a, Counted b) { return chosen(a.value != b.value); }
  // A hyper-parameter that is zero decides for the whole loop.
  friend bool operator==(Counted a, Counted b) { return a.value == b.value; }
};

/// `states`: how many of the rule's it reads.
template <class F>
void print_formula(const char* name, int states, F f) {
  Counted::arithmetic = Counted::choices = 0;
  f();
  std::printf("formula %s %d %d %d\n", name, Counted::arithmetic, Counted::choices, states);
}

/// Prints what the row's variant does to one element, and returns the states that it uses.
template <template <class> class Rule>
std::vector<bool> describe(const double* row) {
  using Counting = Rule<Counted>;
  constexpr int kStates = Counting::kStates;
  const Counting rule(*reinterpret_cast<const typename Counting::Row*>(row), {1, 1, 2});
  const Counted w = 1, g = -1;  // Lion then makes both of its choices
  std::vector<bool> used;
  with_variant(rule, [&](auto variant) {
    constexpr int kVariant = variant;
    constexpr auto& kUses = Counting::kUses[kVariant];
    used.assign(kUses, kUses + kStates);
    Counted states[kStates], u;
    print_formula("direction", static_cast<int>(std::count(kUses, kUses + kStates, true)),
                  [&] { u = rule.template direction<kVariant>(w, g, states, Counted(1)); });
    if constexpr (Counting::kConcludes[kVariant]) {
      int read = 0;  // what it reads can make it NaN
      for (Counted& state : states) {
        const Counted kept = std::exchange(state, std::numeric_limits<double>::quiet_NaN());
        read += std::isnan(rule.template conclude<kVariant>(states).value);
        state = kept;
      }
      print_formula("conclude", read, [&] { u = rule.template conclude<kVariant>(states); });
    }
    print_formula("update", 0, [&] { rule.update(w, u, Counted(1)); });
    print_formula("applied", 0, [&] { rule.applied(w, u, Counted(1)); });
    print_formula("measured", 0, [&] { rule.measured(w, g); });
  });
  return used;
}

std::vector<bool> describe(std::string_view family, const double* row) {
#define DK_DESCRIBE(name, Rule) \
  if (family == name) return describe<dk::DK_ARCH::Rule>(row);
  DK_FOR_EACH_RULE(DK_DESCRIBE)
  throw std::invalid_argument("family");
}

// --- a step

template <class All, class Name>
int index_of(const All& all, std::string_view wanted, Name name) {
  for (std::size_t i = 0; i < std::size(all); ++i) {
    if (wanted == name(all[i])) return static_cast<int>(i);
  }
  throw std::invalid_argument(std::string(wanted));
}

/// Ones, on a cache line's boundary.
float* array_of(const char* name, std::int64_t size) {
  const std::size_t bytes = size * sizeof(float);
  auto* const array = static_cast<float*>(std::aligned_alloc(64, bytes));
  std::fill(array, array + size, 1.0f);
  std::printf("array %s %p %zu\n", name, static_cast<void*>(array), bytes);
  return array;
}

void run(int argc, char** argv) {
  if (argc < 6) throw std::invalid_argument("single_step TARGET FAMILY KIND SIZE ROW...");
  const auto name_of = [](const auto& named) { return named.name; };
  const dk::Target& target = dk::targets()[index_of(dk::targets(), argv[1], name_of)];
  const int family = index_of(dk::families(), argv[2], name_of);
  const std::string kind = argv[3];
  const std::int64_t size = std::atol(argv[4]);
  std::vector<double> row;
  for (int i = 5; i < argc; ++i) row.push_back(std::atof(argv[i]));
  const std::vector<bool> used = describe(argv[2], row.data());

  float step = 1;
  dk::Layer layer{.weights = array_of("weights", size),
                  .rounded = nullptr,
                  .states = {},
                  .step = &step,
                  .size = size,
                  .slot = 0,
                  .measures = 0,
                  .options = 0,
                  .gradient_type = 0,
                  .type = 0,
                  .state_type = 0};
  const void* const gradient = array_of("gradient", size);
  for (std::size_t k = 0; k < used.size(); ++k) {
    if (used[k]) layer.states[k] = array_of("states", size);
  }
  std::vector<dk::Item> items;
  if (kind == "scan") items.push_back({0, size, 0, dk::Kind::scan});
  items.push_back({0, size, 0, kind == "whole" ? dk::Kind::whole : dk::Kind::plain});
  dk::Engine engine(family, target, {layer}, items);
  const auto take_step = [&] {
    engine.run(&gradient, row.data(), 1, 1, std::numeric_limits<double>::infinity(), false);
  };
  take_step();

  place = static_cast<int*>(std::calloc(&etext - &__executable_start, sizeof *place));
  struct sigaction action{};
  action.sa_sigaction = on_trap;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGTRAP, &action, nullptr);
  flip_trap_flag();
  take_step();
  flip_trap_flag();

  for (int i = 0; i < known; ++i) {
    std::printf("%p %ld", static_cast<const void*>(visits[i].instruction), visits[i].count);
    for (const greg_t value : visits[i].registers) std::printf(" %llx", static_cast<long long>(value));
    std::printf("\n");
  }
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
