//! Feature bits: which of a backend's offer reaches the guest, and which of the guest's choice the
//! backend.
//!
//! The device's own bits and the ring's pass through. What belongs to the transport is the VMM's:
//! a feature that needs its help is offered only if it helps.

/// The guest may use only the modern interface (virtio 1.3, section 6).
pub const VERSION_1: u64 = 1 << 32;
/// vhost-user's own bit: the backend knows protocol features. Not a guest's business.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Requests are answered in the order in which they were made.
pub const IN_ORDER: u64 = 1 << 35;

/// Bits that never reach a guest.
const WITHHELD: u64 = 1 << 24 // NOTIFY_ON_EMPTY: legacy only.
    | 1 << 26 // VHOST_F_LOG_ALL: between frontend and backend.
    | 1 << 27 // ANY_LAYOUT: legacy only.
    | PROTOCOL_FEATURES
    | 1 << 33 // ACCESS_PLATFORM: there is no IOMMU in front of a virtio device.
    | 1 << 34 // RING_PACKED: its position does not fit into the messages of the vhost crate.
    | 1 << 37 // SR_IOV
    | 1 << 38 // NOTIFICATION_DATA: an ioeventfd loses the data.
    | 1 << 39 // NOTIF_CONFIG_DATA
    | 1 << 40 // RING_RESET: queues are not reset one by one.
    | 1 << 41; // ADMIN_VQ

/// What a guest is offered of what a backend offers.
#[must_use]
pub fn offered_to_guest(backend: u64) -> u64 {
    backend & !WITHHELD
}

/// What a backend is told of what a guest acknowledged.
#[must_use]
pub fn for_backend(acknowledged: u64, backend: u64) -> u64 {
    acknowledged | backend & PROTOCOL_FEATURES
}

/// Whether a driver may acknowledge these of the features on offer.
#[must_use]
pub fn is_acceptable(acknowledged: u64, offered: u64) -> bool {
    acknowledged & !offered == 0 && acknowledged & VERSION_1 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_and_ring_bits_pass_and_the_transports_do_not() {
        let ring = 1 << 28 | 1 << 29 | VERSION_1 | 1 << 35;
        let device = 0xff_ffff | 1 << 50;
        assert_eq!(offered_to_guest(u64::MAX) & (ring | device), ring | device);
        for withheld in [26, 30, 33, 34, 38, 40] {
            assert_eq!(offered_to_guest(u64::MAX) & 1 << withheld, 0);
        }
    }

    #[test]
    fn a_driver_needs_version_1_and_takes_only_what_is_offered() {
        assert!(is_acceptable(VERSION_1, VERSION_1 | 3));
        assert!(!is_acceptable(3, VERSION_1 | 3));
        assert!(!is_acceptable(VERSION_1 | 4, VERSION_1 | 3));
    }

    #[test]
    fn the_backend_sees_its_own_bit_again() {
        let backend = VERSION_1 | PROTOCOL_FEATURES | 1;
        assert_eq!(for_backend(VERSION_1, backend), VERSION_1 | PROTOCOL_FEATURES);
        assert_eq!(for_backend(VERSION_1, VERSION_1), VERSION_1);
    }
}
