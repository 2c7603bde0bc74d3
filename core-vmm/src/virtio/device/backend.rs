//! Who serves the device, if anybody does.

use std::os::fd::{AsFd, BorrowedFd};

use nacre_proto::vmm::DeviceState;

use crate::virtio::frontend::{Absence, Absent, Kept, LinkState, Negotiated, Running};

/// The frontend's state.
pub(super) enum Backend {
    Negotiated(Negotiated),
    Running(Running),
    Absent(Absent),
}

impl Backend {
    pub(super) fn kept(&self) -> &Kept {
        match self {
            Self::Negotiated(backend) => backend.kept(),
            Self::Running(backend) => backend.kept(),
            Self::Absent(absent) => absent.kept(),
        }
    }

    /// How the connection is, if there is one.
    pub(super) fn link_state(&self) -> Option<LinkState> {
        match self {
            Self::Negotiated(backend) => Some(backend.link_state()),
            Self::Running(backend) => Some(backend.link_state()),
            Self::Absent(_) => None,
        }
    }

    /// The connection, if there is one.
    pub(super) fn socket(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Negotiated(backend) => Some(backend.as_fd()),
            Self::Running(backend) => Some(backend.as_fd()),
            Self::Absent(_) => None,
        }
    }

    /// Where the backend says what it was not asked, if it can.
    pub(super) fn channel(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Negotiated(backend) => backend.channel(),
            Self::Running(backend) => backend.channel(),
            Self::Absent(_) => None,
        }
    }

    /// Whether a process that was the backend may still write to the guest's memory.
    pub(super) fn may_write_unwatched(&self) -> bool {
        matches!(self, Self::Absent(absent) if absent.may_write())
    }

    /// The driver has reset the device, and no backend serves its rings.
    pub(super) fn forget_driver(&mut self) {
        match self {
            Self::Negotiated(backend) => backend.forget_driver(),
            Self::Absent(absent) => absent.forget_driver(),
            Self::Running(_) => {}
        }
    }

    pub(super) fn state(&self) -> DeviceState {
        match self {
            Self::Negotiated(_) => DeviceState::Idle,
            Self::Running(_) => DeviceState::Active,
            Self::Absent(absent) => match absent.absence() {
                Absence::Lost { .. } => DeviceState::Lost,
                Absence::Quiesced => DeviceState::Quiesced,
            },
        }
    }
}
