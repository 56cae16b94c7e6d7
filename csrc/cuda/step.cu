#include "launch.cuh"
#include "step.cuh"

namespace commrt::cuda {
namespace {

// Queue a kernel for each batch of a list, a warp for each unit.
template <typename Tensor, typename Units>
void launch_batches(void (*kernel)(Batch<Tensor>), const Tensor* tensors, int count,
                    const StepOptions& options, Queue queue, Units units) {
  Batch<Tensor> batch = {};
  batch.options = options;
  for (int i = 0; i < count; ++i) {
    const std::int64_t more = units(tensors[i]);
    if (more > 0) {
      batch.tensors[batch.count] = tensors[i];
      batch.first_unit[batch.count + 1] = batch.first_unit[batch.count] + more;
      ++batch.count;
    }
    if (batch.count == kBatch || (i + 1 == count && batch.count > 0)) {
      const std::int64_t total = batch.first_unit[batch.count];
      launch(kernel, static_cast<unsigned>((total + kWarps - 1) / kWarps), kThreads, 0, queue,
             batch);
      batch.count = 0;
    }
  }
}

std::int64_t segments(const StepTensor& tensor) { return tensor.rows * segments_per_row(tensor); }

// The kernels of a rule, by storage.
using Kernel = void (*)(Batch<StepTensor>);

void step(const StepList& list, Queue queue, const Kernel (&kernels)[3]) {
  for (const Storage storage : {Storage::kFloat32, Storage::kBFloat16, Storage::kEightBits}) {
    launch_batches(
        kernels[static_cast<int>(storage)], list.tensors, list.count, list.options, queue,
        [=](const StepTensor& tensor) { return tensor.storage == storage ? segments(tensor) : 0; });
  }
}

template <typename Rule>
constexpr Kernel kKernels[] = {&step_kernel<Rule, Storage::kFloat32>,
                               &step_kernel<Rule, Storage::kBFloat16>,
                               &step_kernel<Rule, Storage::kEightBits>};

}  // namespace

void adam_mini(const StepList& list, Queue queue) {
  launch_batches(&second_kernel<kWarps>, list.tensors, list.count, list.options, queue,
                 [](const StepTensor& tensor) {
                   const bool is_updated = tensor.second_from == Second::kUpdated;
                   return is_updated ? tensor.rows / tensor.block_rows : 0;
                 });
  step(list, queue,
       {&adam_mini_kernel<Storage::kFloat32>, &adam_mini_kernel<Storage::kBFloat16>,
        &adam_mini_kernel<Storage::kEightBits>});
}

void adamw(const StepList& list, Queue queue) { step(list, queue, kKernels<AdamWRule>); }
void mofo(const StepList& list, Queue queue) { step(list, queue, kKernels<MofoRule>); }
void lion(const StepList& list, Queue queue) { step(list, queue, kKernels<LionRule>); }
void adan(const StepList& list, Queue queue) { step(list, queue, kKernels<AdanRule>); }

void square_sums(const SquaresList& list, Queue queue) {
  launch_batches(&square_sums_kernel<kWarps>, list.tensors, list.count, StepOptions{}, queue,
                 [](const auto& tensor) {
                   return tensor.by_column ? (tensor.cols + kWarp - 1) / kWarp : tensor.rows;
                 });
}

}  // namespace commrt::cuda
