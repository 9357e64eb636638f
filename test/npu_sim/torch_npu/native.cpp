// The little that PyTorch offers no Python hook for: more than one device (the autograd engine and the
// device guards count them), torch.Generator(device="npu"), and storages made directly on the device.
// Views and factories are here too, so that a view shares its base's Storage and that Storage can be resized
// (FSDP frees and refills parameters that way).  Built once by _native.py.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <cstring>
#include <vector>

namespace {
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;
constexpr auto NPU = c10::DeviceType::PrivateUse1;
thread_local DeviceIndex current = 0;

DeviceIndex count() {
  const char* n = std::getenv("NPU_SIM_DEVICES");
  return static_cast<DeviceIndex>(n ? std::atoi(n) : 1);
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return NPU; }
  Device exchangeDevice(Device d) const override {
    Device old(NPU, current);
    current = d.index();
    return old;
  }
  Device getDevice() const override { return Device(NPU, current); }
  void setDevice(Device d) const override { current = d.index(); }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  Stream getStream(Device d) const noexcept override { return Stream(Stream::DEFAULT, d); }
  Stream getNewStream(Device d, int = 0) const override { return Stream(Stream::DEFAULT, d); }
  Stream exchangeStream(Stream s) const noexcept override { return s; }
  DeviceIndex deviceCount() const noexcept override { return count(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

struct HostMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    void* p = n ? std::malloc(n) : nullptr;
    return {p, p, &std::free, Device(NPU, current)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &std::free; }
  void copy_data(void* to, const void* from, std::size_t n) const override { std::memcpy(to, from, n); }
};
HostMemory memory;
REGISTER_ALLOCATOR(c10::DeviceType::PrivateUse1, &memory)

struct NpuGenerator final : at::CPUGeneratorImpl {
  explicit NpuGenerator(DeviceIndex i) {
    device_ = Device(NPU, i);
    key_set_ = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);
  }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return count(); }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex i) const override { current = i; }
  DeviceIndex exchangeDevice(DeviceIndex i) const override { auto old = current; current = i; return old; }
  DeviceIndex maybeExchangeDevice(DeviceIndex i) const override { return exchangeDevice(i); }
  at::Generator getNewGenerator(DeviceIndex i) const override {
    return at::make_generator<NpuGenerator>(i < 0 ? current : i);
  }
  const at::Generator& getDefaultGenerator(DeviceIndex i) const override {
    static auto* all = [] {
      auto* v = new std::vector<at::Generator>();
      for (DeviceIndex d = 0; d < count(); ++d) v->push_back(at::make_generator<NpuGenerator>(d));
      return v;
    }();
    return all->at(i < 0 ? current : i);
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  Device getDeviceFromPtr(void*) const override { return Device(NPU, current); }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override {
    auto fresh = memory.allocate(n);
    std::memcpy(fresh.get(), s.data(), std::min(n, s.nbytes()));
    s.unsafeGetStorageImpl()->set_data_ptr(std::move(fresh));
    s.unsafeGetStorageImpl()->set_nbytes(n);
  }
};
constexpr c10::DispatchKeySet KEY(c10::DispatchKey::PrivateUse1);

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::DeviceGuard on(device.value_or(Device(NPU, current)));
  return at::detail::empty_generic(size, &memory, KEY, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::DeviceGuard on(device.value_or(Device(NPU, current)));
  return at::detail::empty_strided_generic(size, stride, &memory, KEY, c10::dtype_or_default(dtype));
}

at::Tensor& set_view(at::Tensor& self, at::Storage storage, int64_t offset, c10::IntArrayRef size,
                     c10::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", set_view);
  m.impl("set_.source_Tensor", at::native::set_tensor_);
}

struct Register {
  Register() { at::RegisterPrivateUse1HooksInterface(new Hooks()); }
} reg;
}  // namespace

extern "C" int npu_current() { return current; }
extern "C" void npu_set(int i) { current = static_cast<DeviceIndex>(i); }
