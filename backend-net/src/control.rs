//! The control queue (virtio 1.3, section 5.1.6.5): the one command there is chooses how many
//! queue pairs the guest uses.

use backend_daemon::device::DeviceError;
use backend_daemon::ring::{Chain, Ring};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use crate::pairs::Pairs;

/// Class, command and the number of pairs, in bytes.
const COMMAND_BYTES: usize = 4;

/// Commands in one go; no driver has more than one at a time.
const BUDGET: usize = 16;

/// Executes commands in the queue, each answered in its own status byte, and gives whether there
/// may be more. `most` is the number of pairs that the driver may ask for: without `MQ` none.
pub(crate) fn serve(ring: &mut Ring, pairs: &Pairs, most: u16) -> Result<bool, DeviceError> {
    for _ in 0..BUDGET {
        let Some(chain) = ring.pop()? else { return Ok(false) };
        let status = match parse(&read(&chain), most) {
            Some(wanted) => {
                pairs.set_active(wanted);
                VIRTIO_NET_OK
            }
            None => VIRTIO_NET_ERR,
        };
        let [status, ..] = status.to_le_bytes();
        // A guest that leaves no room for the status does not want it.
        let written = u32::from(chain.write_at(0, &[status]).is_ok());
        ring.push(chain, written)?;
    }
    Ok(true)
}

/// The command's bytes; a shorter one is no command.
fn read(chain: &Chain) -> Vec<u8> {
    let mut bytes = [0; COMMAND_BYTES];
    let read = chain.read_at(0, &mut bytes);
    if read.is_ok() { bytes.to_vec() } else { Vec::new() }
}

/// The number of pairs that a command asks for, if it is one that we know.
fn parse(command: &[u8], most: u16) -> Option<u16> {
    let [class, code, low, high] = *command else { return None };
    let known = u32::from(class) == VIRTIO_NET_CTRL_MQ
        && u32::from(code) == VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET;
    let wanted = u16::from_le_bytes([low, high]);
    (known && (1..=most).contains(&wanted)).then_some(wanted)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    #[test]
    fn the_number_of_pairs_is_from_one_to_what_there_is() {
        assert_eq!(parse(&[4, 0, 1, 0], 4), Some(1));
        assert_eq!(parse(&[4, 0, 4, 0], 4), Some(4));
        assert_eq!(parse(&[4, 0, 0, 0], 4), None);
        assert_eq!(parse(&[4, 0, 5, 0], 4), None);
        assert_eq!(parse(&[4, 0, 1, 1], 4), None);
        assert_eq!(parse(&[4, 0, 1, 0], 0), None);
    }

    #[test]
    fn other_commands_and_short_ones_are_refused() {
        assert_eq!(parse(&[4, 1, 1, 0], 4), None);
        assert_eq!(parse(&[0, 0, 1, 0], 4), None);
        assert_eq!(parse(&[4, 0, 1], 4), None);
        assert_eq!(parse(&[], 4), None);
    }

    proptest! {
        #[test]
        fn any_bytes_ask_for_pairs_that_there_are_or_for_nothing(command: Vec<u8>, most: u16) {
            if let Some(wanted) = parse(&command, most) {
                prop_assert!((1..=most).contains(&wanted));
            }
            let [a, b] = most.to_le_bytes();
            prop_assert_eq!(parse(&[4, 0, a, b], most).is_some(), most > 0);
        }
    }
}
