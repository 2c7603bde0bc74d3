//! One generic virtio device: virtio-pci towards the guest, vhost-user towards its backend.
//!
//! The core knows no device type. What a type needs to be known for (its id, how long its
//! configuration is) the supervisor says in [`DeviceConfig`].
//!
//! ```text
//!            vCPU threads                        control thread
//!   .-----------------------------.   .--------------------------------------.
//!   | VirtioFunction: PciFunction |   | VirtioDevice                         |
//!   |  config space, MSI-X        |   |  frontend:   Connected               |
//!   |  pci_registers (pure)       |-->|   .------ reset -v-----.             |--> backend
//!   |  config cache, doorbells    |   |  Running <-- Negotiated              |
//!   `-----------------------------'   |   `--(lost, asked away)--> Absent    |
//!       one lock, register work       |         another backend <----'       |
//!                                     `--------------------------------------'
//! ```
//!
//! A vCPU never waits for a backend. DRIVER_OK, a reset and writes to the device's configuration
//! are left for the control thread, which is told through an eventfd; reads of the configuration
//! are answered from a cache; a reset reads back as not done until the control thread did it.
//!
//! # How to use it
//!
//! ```text
//! let watchdog = Watchdog::start(enter_jail_and_filter)?; // one thread
//! let all = connect_all(configs_and_sockets, &watchdog)?; // side by side, in the same order
//! let services = Services { router, doorbells };          // Arc<MsiRouter>, Arc<VmFd>
//! let mut device = VirtioDevice::new(negotiated, &services)?;   // for each
//! let slot = bus.attach(device.function())?;      // before the first vCPU runs, or hot-added
//! epoll.add(device.ready_fd(), EPOLLIN);          // level-triggered; the one fd of this device
//! ...
//! device.process(&memory);                        // when ready_fd() is readable; never fails
//! device.reset(); bus.reset();                    // the whole VM resets (vCPUs stopped), and
//! device.is_still();                              // may run again once this holds for all
//! device.quiesce()?;                              // the supervisor asks the backend away
//! device.reconnect(socket, &memory)?;             // it brings another one
//! device.take_loss();                             // and is told when one is lost
//! ```
//!
//! `ready_fd()` is an epoll instance of the device's own: it holds the doorbell of the vCPUs, the
//! backend's socket and its error eventfd, and the device changes what is in there when its backend
//! is lost or returns. The control loop registers it once and never changes it.
//!
//! A vCPU thread may do: `ioctl` with KVM_IOEVENTFD, KVM_IRQFD and KVM_SET_GSI_ROUTING; `write` and
//! `preadv2` on eventfds; `ppoll`. The control thread: the same, `sendmsg`, `recvmsg`, `epoll_ctl`,
//! `fcntl` with F_DUPFD_CLOEXEC and `close`. The watchdog's thread: `shutdown`, `close`. All: `futex`.

mod bar_layout;
mod device;
pub mod device_kind;
mod doorbell;
pub mod features;
pub mod frontend;
mod function;
pub mod pci_registers;
mod startup;
pub mod watchdog;

pub use device::{DeviceError, RequestError, Services, VirtioDevice};
pub use device_kind::DeviceKind;
pub use doorbell::Doorbells;
pub use frontend::{DeviceConfig, FrontendError, Negotiated, connect};
pub use startup::{ConnectError, connect_all};
pub use watchdog::Watchdog;
