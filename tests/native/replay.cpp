// Steps that another machine's engine took, taken again by this one.
//
//   replay STEPS RESULT THREADS MODE...
//
// STEPS (tests/test_aarch64.py writes it) holds what the engine was given: int64 and double, little-endian,
// and the layers' memory. RESULT takes, for each floating-point mode, each step's reports and verdict and
// then the memory as the last step leaves it.
#include <cfenv>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/fp_mode.h"
#include "cpu/launch.h"

namespace {

using Block = std::vector<std::byte>;

class Reader {
 public:
  explicit Reader(const char* path) : file_(std::fopen(path, "rb")) {
    if (file_ == nullptr) throw std::runtime_error(path);
  }
  ~Reader() { std::fclose(file_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  template <class T>
  T value() {
    T value;
    read(&value, sizeof value);
    return value;
  }

  /// A number of bytes, and they.
  Block block() {
    Block block(value<std::int64_t>());
    read(block.data(), block.size());
    return block;
  }

 private:
  void read(void* to, std::size_t bytes) {
    if (std::fread(to, 1, bytes, file_) != bytes) throw std::runtime_error("the file ends early");
  }

  std::FILE* file_;
};

void set_mode(const std::string& mode) {
  if (mode == "upward") {
    std::fesetround(FE_UPWARD);
  } else if (mode == "flush") {
    dk::set_fp_mode(dk::fp_mode() | 1 << 24);  // FPCR.FZ: denormals are zeros
  } else if (mode != "default") {
    throw std::invalid_argument(mode);
  }
}

void replay(const char* path, std::FILE* result, int threads, const std::string& mode) {
  Reader in(path);
  const auto family = in.value<std::int64_t>(), n_layers = in.value<std::int64_t>(),
             n_items = in.value<std::int64_t>(), n_blocks = in.value<std::int64_t>(),
             n_steps = in.value<std::int64_t>();
  std::vector<dk::Layer> layers(n_layers);
  for (dk::Layer& layer : layers) layer = in.value<dk::Layer>();
  std::vector<dk::Item> items(n_items);
  for (dk::Item& item : items) {
    item.begin = in.value<std::int64_t>();
    item.end = in.value<std::int64_t>();
    item.layer = static_cast<std::int32_t>(in.value<std::int64_t>());
    item.kind = static_cast<dk::Kind>(in.value<std::int64_t>());
  }
  std::vector<Block> blocks;
  for (std::int64_t i = 0; i < n_blocks; ++i) blocks.push_back(in.block());
  const auto place = [&]<class T>(T*& pointer) {  // it numbers a block from 1; 0 is null
    const auto block = reinterpret_cast<std::intptr_t>(pointer);
    pointer = block == 0 ? nullptr : static_cast<T*>(static_cast<void*>(blocks[block - 1].data()));
  };
  for (dk::Layer& layer : layers) {
    place(layer.weights);
    place(layer.rounded);
    place(layer.step);
    for (void*& state : layer.states) place(state);
  }

  dk::Engine engine(static_cast<int>(family), dk::targets()[0], layers, items);
  for (std::int64_t step = 0; step < n_steps; ++step) {
    std::vector<Block> gradients;
    for (std::int64_t i = 0; i < n_layers; ++i) gradients.push_back(in.block());
    std::vector<const void*> addresses;
    for (const Block& gradient : gradients) addresses.push_back(gradient.data());
    const Block rows = in.block();
    const auto grad_scale = in.value<double>();
    const auto max_grad_norm = in.value<double>();
    const auto skip_nonfinite = in.value<std::int64_t>() != 0;
    engine.check_counters();
    const dk::FpMode before = dk::fp_mode();
    set_mode(mode);
    engine.run(addresses.data(), reinterpret_cast<const double*>(rows.data()), threads, grad_scale,
               max_grad_norm, skip_nonfinite);
    dk::set_fp_mode(before);
    bool restored = true;
#pragma omp parallel num_threads(threads) reduction(&& : restored)
    restored = dk::fp_mode() == before;
    if (!restored) throw std::runtime_error("a worker has kept the mode");
    std::fwrite(engine.reports.data(), sizeof(dk::LayerReport), engine.reports.size(), result);
    std::fwrite(&engine.verdict, sizeof engine.verdict, 1, result);
  }
  for (const Block& block : blocks) std::fwrite(block.data(), 1, block.size(), result);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  std::FILE* const result = std::fopen(argv[2], "wb");
  if (result == nullptr) return 2;
  for (int i = 4; i < argc; ++i) replay(argv[1], result, std::atoi(argv[3]), argv[i]);
  return std::fclose(result) == 0 ? 0 : 1;
}
