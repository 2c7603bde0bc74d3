//! The serial port (a 16550 at 0x3f8), for debugging: slow, an exit a byte.

use std::{
    fs::File,
    io::{self, Write},
    sync::{Mutex, MutexGuard},
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_superio::{Serial, Trigger, serial::SerialEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{bus::BusDevice, locked};

/// The first port of COM1.
pub const PORT: u16 = 0x3f8;
/// How many it has.
pub const PORTS: u64 = 8;

/// Its interrupt, an edge for KVM.
struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// Tells the control loop that there is room for input again.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        if let Err(error) = self.0.write(1) {
            log::error!("can't wake the control loop for serial input: {error}");
        }
    }
}

/// How long a reader may keep the guest waiting before its bytes are lost.
const PATIENCE: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };
const AT_ONCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

/// Where the bytes go.
///
/// Writing never blocks for long: a vCPU that waits for a reader can't be stopped, and holds the
/// lock that the control thread takes to give input. A reader that was too slow once is waited for
/// no more until it reads again.
struct Sink {
    file: File,
    is_stalled: bool,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let patience = if self.is_stalled { AT_ONCE } else { PATIENCE };
        let mut ready = [PollFd::new(&self.file, PollFlags::OUT)];
        self.is_stalled = poll(&mut ready, Some(&patience)).is_ok_and(|count| count == 0);
        if self.is_stalled { Ok(bytes.len()) } else { self.file.write(bytes) }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = Serial<Interrupt, Drained, Sink>;

/// The port.
pub struct SerialPort {
    // vCPU threads read and write registers, the control thread adds input.
    uart: Mutex<Uart>,
    interrupt: EventFd,
    drained: EventFd,
}

impl SerialPort {
    /// A port whose output goes to `output`.
    ///
    /// # Errors
    ///
    /// Fails if the host has no descriptors left.
    pub fn new(output: File) -> io::Result<Self> {
        let interrupt = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let drained = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        let uart = Serial::with_events(
            Interrupt(interrupt.try_clone()?),
            Drained(drained.try_clone()?),
            Sink { file: output, is_stalled: false },
        );
        Ok(Self { uart: Mutex::new(uart), interrupt, drained })
    }

    /// The UART is valid after each of its operations, so a panic elsewhere spoils nothing.
    fn uart(&self) -> MutexGuard<'_, Uart> {
        locked(&self.uart)
    }

    /// What to register with KVM for its interrupt.
    #[must_use]
    pub fn interrupt(&self) -> &EventFd {
        &self.interrupt
    }

    /// Readable when the guest has taken all input.
    #[must_use]
    pub fn drained(&self) -> &EventFd {
        &self.drained
    }

    /// How many bytes of input there is room for.
    #[must_use]
    pub fn room(&self) -> usize {
        self.uart().fifo_capacity()
    }

    /// Gives input, no more than there is room for.
    pub fn input(&self, bytes: &[u8]) {
        if let Err(error) = self.uart().enqueue_raw_bytes(bytes) {
            log::debug!("serial input is lost: {error:?}");
        }
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data) {
            *value = self.uart().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(offset), [value]) = (u8::try_from(offset), data)
            && let Err(error) = self.uart().write(offset, *value)
        {
            log::debug!("serial output is lost: {error:?}");
        }
    }
}
