//! What the core has to know about a device type, as data: vhost-user says none of it.
//!
//! No code in the core depends on a device's type.

/// A virtio device id (virtio 1.3, section 5).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceKind(pub u16);

struct Facts {
    kind: u16,
    /// PCI base class and subclass.
    class: [u8; 2],
    /// How much of the configuration every backend of that type answers for.
    config_len_bytes: u16,
    /// Queues of a backend that can't be asked.
    queues: u16,
}

/// Configuration lengths are those of the oldest backends in use, as a backend that is asked for
/// more than it has refuses all of it.
const FACTS: [Facts; 6] = [
    // mac, status, max_virtqueue_pairs, mtu
    Facts { kind: 1, class: [0x02, 0x00], config_len_bytes: 12, queues: 2 },
    // up to write_zeroes_may_unmap
    Facts { kind: 2, class: [0x01, 0x80], config_len_bytes: 60, queues: 1 },
    // cols, rows, max_nr_ports, emerg_wr
    Facts { kind: 3, class: [0x07, 0x80], config_len_bytes: 12, queues: 2 },
    // has no configuration
    Facts { kind: 4, class: [0xff, 0x00], config_len_bytes: 0, queues: 1 },
    // guest_cid; receive, transmit and event queue
    Facts { kind: 19, class: [0x02, 0x80], config_len_bytes: 8, queues: 3 },
    // tag, num_request_queues; high-priority and request queue
    Facts { kind: 26, class: [0x01, 0x80], config_len_bytes: 40, queues: 2 },
];

/// A type that is not in the table.
const UNKNOWN: Facts = Facts { kind: 0, class: [0xff, 0x00], config_len_bytes: 0, queues: 1 };

impl DeviceKind {
    fn facts(self) -> &'static Facts {
        FACTS.iter().find(|facts| facts.kind == self.0).unwrap_or(&UNKNOWN)
    }

    /// The PCI device id of the modern interface (virtio 1.3, section 4.1.2.1).
    #[must_use]
    pub fn pci_device_id(self) -> u16 {
        0x1040_u16.saturating_add(self.0)
    }

    /// PCI base class, subclass and programming interface. Drivers go by the ids.
    #[must_use]
    pub fn pci_class(self) -> [u8; 3] {
        let [base, sub] = self.facts().class;
        [base, sub, 0]
    }

    /// How long the configuration is unless the supervisor says otherwise.
    #[must_use]
    pub fn config_len_bytes(self) -> u16 {
        self.facts().config_len_bytes
    }

    /// How many queues there are unless the supervisor or the backend says otherwise.
    #[must_use]
    pub fn queue_count(self) -> u16 {
        self.facts().queues
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_nobody_knows_still_has_an_id_and_a_queue() {
        let kind = DeviceKind(63);
        assert_eq!(kind.pci_device_id(), 0x107f);
        assert_eq!((kind.config_len_bytes(), kind.queue_count()), (0, 1));
        assert_eq!(DeviceKind(2).config_len_bytes(), 60);
    }
}
