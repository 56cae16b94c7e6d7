// The optimizers' part of kernel_check: lists of matrices, whose shapes fit no vector.
#include <deque>

#include "../cuda/ops.h"
#include "../step.h"
#include "check.h"

namespace commrt {

namespace portable {
void adam_mini(const StepList&, std::int64_t, std::int64_t);
void adamw(const StepList&, std::int64_t, std::int64_t);
void adan(const StepList&, std::int64_t, std::int64_t);
void lion(const StepList&, std::int64_t, std::int64_t);
void mofo(const StepList&, std::int64_t, std::int64_t);
void square_sums(const SquaresList&, std::int64_t, std::int64_t);
}  // namespace portable

namespace {

struct Shape {
  std::int64_t rows, cols, block_rows;
};
constexpr Shape kShapes[] = {{1, 1, 1}, {3, 31, 3}, {2, 256, 1}, {6, 300, 2}, {1, 1100, 1}};
constexpr DType kDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr Storage kStorages[] = {Storage::kFloat32, Storage::kBFloat16, Storage::kEightBits};
constexpr WeightFormat kWeights[] = {WeightFormat::kFloat32, WeightFormat::kMaster,
                                     WeightFormat::kResidual, WeightFormat::kStochastic};

// Buffers of a list's tensors, each twice: a copy for the kernels and one for the CPU.
class List {
 public:
  explicit List(std::mt19937& random) : random_(random) {}

  void add(const Shape& shape, DType grad, WeightFormat weights, Storage storage,
           const std::vector<bool>& has_sign, Second second, int index) {
    const std::int64_t numel = shape.rows * shape.cols;
    StepTensor tensor = {};
    tensor.rows = shape.rows;
    tensor.cols = shape.cols;
    tensor.block_rows = shape.block_rows;
    tensor.grad_dtype = grad;
    tensor.weight_format = weights;
    tensor.weight_dtype = weights == WeightFormat::kFloat32 ? DType::kFloat32 : DType::kBFloat16;
    tensor.storage = storage;
    tensor.stochastic = index % 2;
    tensor.seed = kSeed;
    tensor.first_index = kFirstIndex + static_cast<unsigned>(index);
    tensor.index_stride = static_cast<std::uint64_t>(shape.cols + index % 3);
    tensor.second_from = second;
    StepTensor twin = tensor;
    put(&StepTensor::grad, tensor, twin, floats(numel, grad, 1e-3f), element_size(grad), index);
    put(&StepTensor::weights, tensor, twin, floats(numel, tensor.weight_dtype, 0.02f),
        element_size(tensor.weight_dtype), index + 1);
    if (weights == WeightFormat::kMaster) {
      put(&StepTensor::extra, tensor, twin, floats(numel, DType::kFloat32, 0.02f), 4, index);
    } else if (weights == WeightFormat::kResidual) {
      put(&StepTensor::extra, tensor, twin, bytes(numel), 1, index);
    }
    for (std::size_t k = 0; k < has_sign.size(); ++k) {
      put_moment(tensor.moments[k], twin.moments[k], tensor, has_sign[k], index);
    }
    const std::int64_t seconds = second == Second::kOfColumn ? shape.cols : shape.rows;
    put(&StepTensor::second, tensor, twin, magnitudes(seconds, 1e-3f), 4, index);
    gpu_.push_back(tensor);
    cpu_.push_back(twin);
  }

  StepList list(bool is_gpu, const std::int64_t* first_unit, const StepOptions& options) const {
    const auto& tensors = is_gpu ? gpu_ : cpu_;
    return {tensors.data(), first_unit, static_cast<int>(tensors.size()), options};
  }
  std::vector<Buffer*> buffers() {
    std::vector<Buffer*> all;
    for (Buffer& buffer : buffers_) all.push_back(&buffer);
    return all;
  }
  const std::vector<StepTensor>& tensors() const { return cpu_; }

  // Random numbers of both signs, one in fifty of them not finite.
  std::vector<std::uint8_t> floats(std::int64_t numel, DType dtype, float size) {
    std::vector<std::uint8_t> all(static_cast<std::size_t>(numel * element_size(dtype)));
    std::normal_distribution<float> normal(0.0f, size);
    for (std::int64_t i = 0; i < numel; ++i) {
      const float x = i % 256 == 77 ? INFINITY : normal(random_);
      const std::uint16_t half = dtype == DType::kBFloat16 ? float_to_bf16(x) : float_to_fp16(x);
      std::uint8_t* to = all.data() + i * element_size(dtype);
      dtype == DType::kFloat32 ? std::memcpy(to, &x, 4) : std::memcpy(to, &half, 2);
    }
    return all;
  }

  Buffer& buffer(const std::vector<std::uint8_t>& content, int shift) {
    buffers_.emplace_back(static_cast<std::int64_t>(content.size()), shift);
    buffers_.back().set(content.data());
    return buffers_.back();
  }

 private:
  std::vector<std::uint8_t> bytes(std::int64_t count) {
    std::vector<std::uint8_t> all(static_cast<std::size_t>(count));
    for (std::uint8_t& byte : all) byte = static_cast<std::uint8_t>(random_());
    return all;
  }
  std::vector<std::uint8_t> magnitudes(std::int64_t count, float size) {
    std::vector<std::uint8_t> all(static_cast<std::size_t>(4 * count));
    std::uniform_real_distribution<float> uniform(0.0f, size);
    for (std::int64_t i = 0; i < count; ++i) {
      const float x = uniform(random_);
      std::memcpy(all.data() + 4 * i, &x, 4);
    }
    return all;
  }

  template <typename Pointer>
  void put(Pointer StepTensor::* member, StepTensor& tensor, StepTensor& twin,
           const std::vector<std::uint8_t>& content, std::int64_t size, int index) {
    Buffer& made = buffer(content, index % 2 ? static_cast<int>(size) : 0);
    tensor.*member = reinterpret_cast<Pointer>(made.gpu());
    twin.*member = reinterpret_cast<Pointer>(made.cpu());
  }
  void put_moment(Moment& moment, Moment& twin, const StepTensor& tensor, bool has_sign,
                  int index) {
    const std::int64_t numel = tensor.rows * tensor.cols;
    const bool is_half = tensor.storage == Storage::kBFloat16 && has_sign;
    const bool is_coded = tensor.storage == Storage::kEightBits;
    const int size = is_coded ? 1 : is_half ? 2 : 4;
    Buffer& values =
        buffer(is_coded   ? bytes(numel)
               : has_sign ? floats(numel, is_half ? DType::kBFloat16 : DType::kFloat32, 1e-3f)
                          : magnitudes(numel, 1e-5f),
               index % 2 ? size : 0);
    moment.values = values.gpu();
    twin.values = values.cpu();
    if (!is_coded) return;
    Buffer& scales =
        buffer(magnitudes(tensor.rows * segments_per_row(tensor), 1e-5f), index % 2 ? 4 : 0);
    moment.scales = reinterpret_cast<float*>(scales.gpu());
    twin.scales = reinterpret_cast<float*>(scales.cpu());
  }

  std::mt19937& random_;
  std::deque<Buffer> buffers_;
  std::vector<StepTensor> gpu_, cpu_;
};

using CpuStep = void (*)(const StepList&, std::int64_t, std::int64_t);
using GpuStep = void (*)(const StepList&, cuda::Queue);

// Lists of each combination of formats; some have more tensors than a launch takes.
void check_step(Checks& checks, std::mt19937& random, const char* name, CpuStep cpu, GpuStep gpu,
                const std::vector<bool>& has_sign, bool has_rows) {
  int index = 0;
  const float factor = 0.5f;
  for (const DType grad : kDTypes) {
    for (const WeightFormat weights : kWeights) {
      for (const Storage storage : kStorages) {
        for (int again = 0; again < 2; ++again, ++index) {
          List list(random);
          std::vector<std::int64_t> first_unit = {0};
          for (int i = 0; i < (index % 24 ? 3 : 23); ++i) {
            const Shape& shape = kShapes[(index + i) % 5];
            const auto second = static_cast<Second>(has_rows ? i % 3 : 0);
            list.add(shape, grad, weights, storage, has_sign, second, index + i);
            const std::int64_t per_unit =
                has_rows ? rows_per_unit(shape.cols, shape.block_rows) : kUnitElements / kSegment;
            const std::int64_t work =
                has_rows ? shape.rows : shape.rows * segments_per_row(list.tensors().back());
            first_unit.push_back(first_unit.back() + (work + per_unit - 1) / per_unit);
          }
          StepOptions options = {0.9f,
                                 0.95f,
                                 0.98f,
                                 1e-8f,
                                 0.999f,
                                 1e-3f,
                                 2e-4f,
                                 1.0f,
                                 0.7f,
                                 2.0f,
                                 index % 3 ? &factor : nullptr};
          cpu(list.list(false, first_unit.data(), options), 0, first_unit.back());
          gpu(list.list(true, nullptr, options), {});
          checks.expect(std::string(name) + " case " + std::to_string(index), list.buffers());
        }
      }
    }
  }
}

}  // namespace

void check_adam_mini(Checks& checks, std::mt19937& random) {
  check_step(checks, random, "adam_mini", portable::adam_mini, cuda::adam_mini, {true}, true);
}
void check_adamw(Checks& checks, std::mt19937& random) {
  check_step(checks, random, "adamw", portable::adamw, cuda::adamw, {true, false}, false);
}
void check_adan(Checks& checks, std::mt19937& random) {
  check_step(checks, random, "adan", portable::adan, cuda::adan, {true, true, false, true}, false);
}
void check_lion(Checks& checks, std::mt19937& random) {
  check_step(checks, random, "lion", portable::lion, cuda::lion, {true}, false);
}
void check_mofo(Checks& checks, std::mt19937& random) {
  check_step(checks, random, "mofo", portable::mofo, cuda::mofo, {true, false}, false);
}

void check_square_sums(Checks& checks, std::mt19937& random) {
  for (int index = 0; index < 48; ++index) {
    const DType dtype = kDTypes[index % 3];
    List made(random);
    std::vector<SquaresTensor> gpu, cpu;
    std::vector<std::int64_t> first_unit = {0};
    for (int i = 0; i < (index % 24 ? 3 : 27); ++i) {
      const Shape& shape = kShapes[(index + i) % 5];
      const bool by_column = (index / 3 + i) % 2;
      const std::int64_t count = by_column ? shape.cols : shape.rows;
      Buffer& grad = made.buffer(made.floats(shape.rows * shape.cols, dtype, 1.0f),
                                 i % 2 ? static_cast<int>(element_size(dtype)) : 0);
      Buffer& sums = made.buffer(std::vector<std::uint8_t>(static_cast<std::size_t>(8 * count)), 0);
      gpu.push_back({grad.gpu(), dtype, shape.rows, shape.cols,
                     reinterpret_cast<double*>(sums.gpu()), by_column});
      cpu.push_back({grad.cpu(), dtype, shape.rows, shape.cols,
                     reinterpret_cast<double*>(sums.cpu()), by_column});
      const std::int64_t per_unit = by_column ? kSegment : rows_per_unit(shape.cols, 1);
      first_unit.push_back(first_unit.back() + (count + per_unit - 1) / per_unit);
    }
    const auto count = static_cast<int>(gpu.size());
    portable::square_sums({cpu.data(), first_unit.data(), count}, 0, first_unit.back());
    cuda::square_sums({gpu.data(), nullptr, count}, {});
    checks.expect("square_sums case " + std::to_string(index), made.buffers());
  }
}

}  // namespace commrt
