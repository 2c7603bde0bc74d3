//! The MSI-X vectors of one function and the eventfds that fire them.
//!
//! A source is an eventfd that lives as long as the function: a backend holds the other end, and
//! nobody ever has to tell it about vectors. While the guest lets a source's vector fire, the
//! eventfd is bound to the vector's line; while not, what is written accumulates, shows as a pending
//! bit, and fires when it is bound again.
//!
//! After each change the bindings are brought into line in the one safe order: unbind, tell the
//! routes, bind. A line is allocated when its vector can fire for the first time, so that vectors
//! that a driver never uses cost nothing.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::{Gsi, MsiRoute, MsiRouter};
use crate::pci::complaint::Complaints;
use crate::pci::msix::{Msix, MsixEffect};
use crate::{error_chain, shared_event};

/// A source that fires nothing (virtio 1.3, section 4.1.5.1.2: VIRTIO_MSI_NO_VECTOR).
pub const NO_VECTOR: u16 = 0xffff;

/// A source's number within its function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SourceIndex(pub u16);

/// What fires the vectors of one function. Dropping it ends all bindings.
pub struct Vectors {
    router: Arc<MsiRouter>,
    msix: Msix,
    /// The line of each vector that could fire once; `msix.vectors()` of them.
    lines: Vec<Option<Gsi>>,
    sources: Vec<Source>,
    complaints: Complaints,
}

struct Source {
    event: EventFd,
    vector: u16,
    bound: Option<Gsi>,
}

impl Vectors {
    /// One vector and one source for each of `events`; every source fires nothing yet. `name` is
    /// for the log.
    ///
    /// # Panics
    ///
    /// Panics if `events` is empty or longer than MSI-X allows (2048).
    #[must_use]
    pub fn new(name: &str, router: Arc<MsiRouter>, events: Vec<EventFd>) -> Self {
        let count = u16::try_from(events.len()).expect("a function has at most 2048 sources");
        let sources = events
            .into_iter()
            .map(|event| Source { event, vector: NO_VECTOR, bound: None })
            .collect();
        let lines = vec![None; usize::from(count)];
        let complaints = Complaints::about(name);
        Self { router, msix: Msix::new(count), lines, sources, complaints }
    }

    /// The table as the guest sees it.
    #[must_use]
    pub fn msix(&self) -> &Msix {
        &self.msix
    }

    /// What fires a source.
    #[must_use]
    pub fn event(&self, source: SourceIndex) -> Option<&EventFd> {
        self.sources.get(usize::from(source.0)).map(|source| &source.event)
    }

    /// Lets the guest change the table and brings the bindings into line.
    pub fn change(&mut self, change: impl FnOnce(&mut Msix) -> MsixEffect) {
        match change(&mut self.msix) {
            MsixEffect::None => {}
            MsixEffect::Changed => self.synchronise(),
        }
    }

    /// Makes `source` fire `vector`, or nothing if there is no such vector. Returns what it fires
    /// from now on, for the guest to read back.
    pub fn assign(&mut self, source: SourceIndex, vector: u16) -> u16 {
        let vector = if vector < self.msix.vectors() { vector } else { NO_VECTOR };
        let Some(source) = self.sources.get_mut(usize::from(source.0)) else { return NO_VECTOR };
        if source.vector != vector {
            source.vector = vector;
            self.synchronise();
        }
        vector
    }

    /// Makes every source fire nothing and forgets what it wanted to fire, as a device reset does.
    pub fn unassign_all(&mut self) {
        for source in &mut self.sources {
            source.vector = NO_VECTOR;
        }
        self.synchronise();
        for source in &self.sources {
            shared_event::drain(&source.event);
        }
    }

    /// Back to power-on: the table masked and disabled, the lines given back.
    pub fn reset(&mut self) {
        self.change(Msix::reset);
        self.unassign_all();
        let lines: Vec<Gsi> = self.lines.iter_mut().filter_map(Option::take).collect();
        self.router.release(&lines);
    }

    /// Whether something wants to fire `vector` and may not.
    #[must_use]
    pub fn is_pending(&self, vector: u16) -> bool {
        self.sources.iter().filter(|source| source.vector == vector).any(Source::is_raised)
    }

    /// Brings lines, routes and bindings into line with the table.
    fn synchronise(&mut self) {
        let wanted: Vec<_> =
            self.sources.iter().map(|source| self.msix.message(source.vector)).collect();
        for (source, message) in self.sources.iter_mut().zip(&wanted) {
            let line = self.lines.get(usize::from(source.vector)).copied().flatten();
            if source.bound.is_some() && (message.is_none() || source.bound != line) {
                source.unbind(&self.router);
            }
        }
        let mut routes = Vec::new();
        for (source, message) in self.sources.iter().zip(&wanted) {
            let Some(message) = *message else { continue };
            let line = &mut self.lines[usize::from(source.vector)];
            match line.map_or_else(|| self.router.allocate(), Ok) {
                Ok(gsi) => {
                    *line = Some(gsi);
                    routes.push(MsiRoute { gsi, message });
                }
                Err(error) => {
                    let vector = source.vector;
                    self.complaints.log(format_args!("vector {vector} stays silent: {error}"));
                }
            }
        }
        if let Err(error) = self.router.route(&routes) {
            // A guest's message that the kernel can't send: this function stays silent.
            let error = error_chain(&error);
            self.complaints.log(format_args!("interrupts stay pending: {error}"));
            return;
        }
        for (source, message) in self.sources.iter_mut().zip(&wanted) {
            let line = self.lines.get(usize::from(source.vector)).copied().flatten();
            if let (Some(gsi), Some(_message), None) = (line, message, source.bound) {
                match self.router.bind(&source.event, gsi) {
                    Ok(()) => source.bound = Some(gsi),
                    Err(error) => {
                        let what = format_args!("cannot bind line {}: {error}", gsi.0);
                        self.complaints.log(what);
                    }
                }
            }
        }
    }
}

impl Source {
    fn unbind(&mut self, router: &MsiRouter) {
        if let Some(gsi) = self.bound.take()
            && let Err(error) = router.unbind(&self.event, gsi)
        {
            log::warn!("cannot unbind an interrupt from line {}: {error}", gsi.0);
        }
    }

    fn is_raised(&self) -> bool {
        shared_event::is_raised(&self.event)
    }
}

impl Drop for Vectors {
    fn drop(&mut self) {
        for source in &mut self.sources {
            source.unbind(&self.router);
        }
        let lines: Vec<Gsi> = self.lines.iter_mut().filter_map(Option::take).collect();
        self.router.release(&lines);
    }
}

impl std::fmt::Debug for Vectors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vectors").field("msix", &self.msix).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::fd::AsRawFd;
    use std::sync::Mutex;

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::interrupt::Irqchip;
    use crate::pci::msix::MsiMessage;

    #[derive(Debug, PartialEq, Eq)]
    enum Call {
        Routes(Vec<(u32, u32)>),
        Bind(i32, u32),
        Unbind(i32, u32),
    }

    #[derive(Default)]
    struct Fake {
        calls: Mutex<Vec<Call>>,
        refused_data: Option<u32>,
    }

    impl Fake {
        fn take(&self) -> Vec<Call> {
            std::mem::take(&mut *self.calls.lock().unwrap())
        }
    }

    impl Irqchip for Fake {
        fn set_routes(&self, routes: &[MsiRoute]) -> io::Result<()> {
            if routes.iter().any(|route| Some(route.message.data) == self.refused_data) {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let routes = routes.iter().map(|route| (route.gsi.0, route.message.data)).collect();
            self.calls.lock().unwrap().push(Call::Routes(routes));
            Ok(())
        }

        fn bind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
            self.calls.lock().unwrap().push(Call::Bind(event.as_raw_fd(), gsi.0));
            Ok(())
        }

        fn unbind(&self, event: &EventFd, gsi: Gsi) -> io::Result<()> {
            self.calls.lock().unwrap().push(Call::Unbind(event.as_raw_fd(), gsi.0));
            Ok(())
        }
    }

    struct Setup {
        chip: Arc<Fake>,
        events: Vec<EventFd>,
        vectors: Vectors,
    }

    fn setup(chip: Fake) -> Setup {
        let chip = Arc::new(chip);
        let router = Arc::new(MsiRouter::new(Arc::clone(&chip) as Arc<dyn Irqchip>));
        let events: Vec<EventFd> = (0..3).map(|_| EventFd::new(EFD_NONBLOCK).unwrap()).collect();
        let clones = events.iter().map(|event| event.try_clone().unwrap()).collect();
        let mut vectors = Vectors::new("test", router, clones);
        vectors.change(|msix| msix.set_control(1 << 15));
        Setup { chip, events, vectors }
    }

    fn program(vectors: &mut Vectors, vector: u16, data: u32) {
        let at = u64::from(vector) * 16;
        vectors.change(|msix| msix.write_table(at, &0xfee0_0000_u64.to_le_bytes()));
        vectors.change(|msix| msix.write_table(at + 8, &u64::from(data).to_le_bytes()));
    }

    fn mask(vectors: &mut Vectors, vector: u16, masked: u32) {
        let at = u64::from(vector) * 16 + 12;
        vectors.change(|msix| msix.write_table(at, &masked.to_le_bytes()));
    }

    fn fd(vectors: &Vectors, source: usize) -> i32 {
        vectors.sources[source].event.as_raw_fd()
    }

    #[test]
    fn unmasking_routes_then_binds_and_masking_only_unbinds() {
        let Setup { chip, mut vectors, .. } = setup(Fake::default());
        assert_eq!(vectors.assign(SourceIndex(1), 2), 2);
        assert_eq!(chip.take(), [], "a masked vector costs nothing");
        program(&mut vectors, 2, 0x41);
        let fd = fd(&vectors, 1);
        chip.take();
        mask(&mut vectors, 2, 1);
        assert_eq!(chip.take(), [Call::Unbind(fd, 24)]);
        mask(&mut vectors, 2, 0);
        assert_eq!(chip.take(), [Call::Bind(fd, 24)], "the route is still there");
        mask(&mut vectors, 2, 0);
        assert_eq!(chip.take(), [], "nothing changed");
    }

    #[test]
    fn a_new_message_is_routed_without_a_new_binding() {
        let Setup { chip, mut vectors, .. } = setup(Fake::default());
        vectors.assign(SourceIndex(0), 0);
        program(&mut vectors, 0, 0x41);
        let fd = fd(&vectors, 0);
        assert_eq!(chip.take(), [Call::Routes(vec![(24, 0x41)]), Call::Bind(fd, 24)]);
        vectors.change(|msix| msix.write_table(8, &0x42_u32.to_le_bytes()));
        assert_eq!(chip.take(), [Call::Routes(vec![(24, 0x42)])]);
    }

    #[test]
    fn sources_that_share_a_vector_share_its_line_and_can_move() {
        let Setup { chip, mut vectors, .. } = setup(Fake::default());
        program(&mut vectors, 0, 0x40);
        program(&mut vectors, 1, 0x41);
        assert_eq!(chip.take(), [], "no source uses them");
        vectors.assign(SourceIndex(0), 0);
        vectors.assign(SourceIndex(1), 0);
        let fds = [fd(&vectors, 0), fd(&vectors, 1)];
        assert_eq!(
            chip.take(),
            [Call::Routes(vec![(24, 0x40)]), Call::Bind(fds[0], 24), Call::Bind(fds[1], 24)]
        );
        vectors.assign(SourceIndex(1), 1);
        assert_eq!(
            chip.take(),
            [
                Call::Unbind(fds[1], 24),
                Call::Routes(vec![(24, 0x40), (25, 0x41)]),
                Call::Bind(fds[1], 25)
            ]
        );
        assert_eq!(vectors.assign(SourceIndex(1), 3), NO_VECTOR, "there are three vectors");
        assert_eq!(chip.take(), [Call::Unbind(fds[1], 25)]);
        assert_eq!(vectors.assign(SourceIndex(9), 1), NO_VECTOR);
    }

    #[test]
    fn what_was_raised_while_masked_is_pending_and_a_reset_forgets_it() {
        let Setup { events, mut vectors, .. } = setup(Fake::default());
        vectors.assign(SourceIndex(2), 1);
        events[2].write(1).unwrap();
        assert!(vectors.is_pending(1) && !vectors.is_pending(0));
        let mut pending = [0];
        vectors.msix().read_pending(0, &mut pending, |vector| vectors.is_pending(vector));
        assert_eq!(pending, [2]);
        vectors.unassign_all();
        assert!(!vectors.is_pending(1));
        vectors.assign(SourceIndex(2), 1);
        assert!(!vectors.is_pending(1));
    }

    #[test]
    fn a_reset_and_a_drop_unbind_before_the_routes_go() {
        let Setup { chip, mut vectors, .. } = setup(Fake::default());
        vectors.assign(SourceIndex(0), 0);
        program(&mut vectors, 0, 0x41);
        let fd = fd(&vectors, 0);
        chip.take();
        vectors.reset();
        assert_eq!(chip.take(), [Call::Unbind(fd, 24), Call::Routes(vec![])]);
        vectors.change(|msix| msix.set_control(1 << 15));
        program(&mut vectors, 0, 0x41);
        vectors.assign(SourceIndex(0), 0);
        chip.take();
        drop(vectors);
        assert_eq!(chip.take(), [Call::Unbind(fd, 24), Call::Routes(vec![])]);
    }

    #[test]
    fn a_message_that_the_kernel_refuses_leaves_the_others_working() {
        let Setup { chip, mut vectors, .. } =
            setup(Fake { refused_data: Some(0x66), ..Default::default() });
        vectors.assign(SourceIndex(0), 0);
        program(&mut vectors, 0, 0x66);
        assert_eq!(chip.take(), []);
        program(&mut vectors, 0, 0x41);
        let fd = fd(&vectors, 0);
        assert_eq!(chip.take(), [Call::Routes(vec![(24, 0x41)]), Call::Bind(fd, 24)]);
        let message = vectors.msix().message(0);
        assert_eq!(message, Some(MsiMessage { address: 0xfee0_0000, data: 0x41 }));
    }
}
