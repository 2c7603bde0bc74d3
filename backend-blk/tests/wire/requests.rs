//! What becomes of each kind of request.

use std::io::{Read as _, Seek as _, SeekFrom};

use backend_daemon::testing::{Buffer, Driver, Options};

use super::{
    DISCARD, DISK_BYTES, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES, every_way,
    header, image, pattern, range, read, simple, start, write,
};

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    for (options, engine) in every_way() {
        let disk = image();
        let daemon = start(&disk, &["--engine", engine]);
        let mut driver = Driver::connect(&daemon.socket(), &options);
        let data = pattern(1, 64 << 10);
        assert_eq!(write(&mut driver, 0, 8, &data), OK, "{options:?}");
        assert_eq!(read(&mut driver, 0, 8, 64 << 10), (data.clone(), OK), "{options:?}");
        assert_eq!(simple(&mut driver, FLUSH, &[]), OK);
        let mut on_disk = vec![0; data.len()];
        let mut file = disk.reopen().unwrap();
        file.seek(SeekFrom::Start(8 * 512)).unwrap();
        file.read_exact(&mut on_disk).unwrap();
        assert_eq!(on_disk, data);
    }
}

#[test]
fn reads_and_writes_past_the_end_fail_and_change_nothing() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let sectors = DISK_BYTES / 512;
    assert_eq!(driver.config(0, 8), sectors.to_le_bytes());
    for sector in [sectors, sectors - 1, u64::MAX, u64::MAX / 512] {
        assert_eq!(read(&mut driver, 0, sector, 1024).1, IOERR);
        assert_eq!(write(&mut driver, 0, sector, &[7; 1024]), IOERR);
    }
    assert_eq!(read(&mut driver, 0, sectors - 1, 512), (vec![0; 512], OK));
    assert_eq!(disk.as_file().metadata().unwrap().len(), DISK_BYTES);
}

#[test]
fn a_read_only_disk_refuses_writes_and_may_be_shared() {
    let disk = image();
    let first = start(&disk, &["--read-only"]);
    let second = start(&disk, &["--read-only"]);
    for daemon in [&first, &second] {
        let mut driver = Driver::connect(&daemon.socket(), &Options::default());
        assert_ne!(driver.features() & 1 << 5, 0, "VIRTIO_BLK_F_RO");
        assert_eq!(write(&mut driver, 0, 0, &[7; 512]), IOERR);
        assert_eq!(read(&mut driver, 0, 0, 512), (vec![0; 512], OK));
    }
}

#[test]
fn the_serial_number_is_what_was_given() {
    let disk = image();
    let daemon = start(&disk, &["--serial", "nacre-0001"]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let header = header(GET_ID, 0);
    let bytes = driver.request(0, &[Buffer::Out(&header), Buffer::In(20), Buffer::In(1)]);
    assert_eq!(&bytes[..10], b"nacre-0001");
    assert_eq!(bytes[10..], [0; 11]);
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes() {
    for engine in ["auto", "blocking"] {
        discard_and_zero(engine);
    }
}

fn discard_and_zero(engine: &str) {
    let disk = image();
    let daemon = start(&disk, &["--engine", engine]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let offered = |driver: &Driver, bit: u32| driver.features() & 1 << bit != 0;
    for (kind, bit, flags) in [(DISCARD, 13, 0), (WRITE_ZEROES, 14, 0), (WRITE_ZEROES, 14, 1)] {
        assert_eq!(write(&mut driver, 0, 0, &pattern(3, 64 << 10)), OK);
        let status = simple(&mut driver, kind, &range(8, 16, flags));
        if !offered(&driver, bit) {
            // The file system under the test can't do it.
            assert_eq!(status, UNSUPP);
            continue;
        }
        assert_eq!(status, OK);
        let (bytes, status) = read(&mut driver, 0, 0, 64 << 10);
        assert_eq!(status, OK);
        let mut expected = pattern(3, 64 << 10);
        expected[8 * 512..24 * 512].fill(0);
        assert!(bytes == expected, "request {kind} with flags {flags}");
    }
    let past_end = range(DISK_BYTES / 512 - 1, 2, 0);
    assert_ne!(simple(&mut driver, DISCARD, &past_end), OK);
    assert_ne!(simple(&mut driver, WRITE_ZEROES, &past_end), OK);
    assert_ne!(simple(&mut driver, WRITE_ZEROES, &range(0, 1, 0x80)), OK);
    assert_ne!(simple(&mut driver, DISCARD, &[0; 15]), OK);
}

#[test]
fn requests_that_make_no_sense_are_answered_and_hurt_nobody() {
    let disk = image();
    let mut daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let unknown = header(77, 0);
    let short = [0; 3];
    let read_header = header(IN, 0);
    assert_eq!(driver.request(0, &[Buffer::Out(&unknown), Buffer::In(1)]), [UNSUPP]);
    assert_eq!(driver.request(0, &[Buffer::Out(&short), Buffer::In(1)]), [IOERR]);
    let odd = [Buffer::Out(&read_header), Buffer::In(100), Buffer::In(1)];
    assert_eq!(driver.request(0, &odd).last(), Some(&IOERR));
    let no_status = driver.submit(0, &[Buffer::Out(&read_header)]);
    assert_eq!(driver.wait(0, no_status).written_bytes, 0);
    let only_in = driver.submit(0, &[Buffer::In(513)]);
    assert_eq!(driver.wait(0, only_in).bytes.last(), Some(&IOERR));
    assert_eq!(read(&mut driver, 0, 0, 512).1, OK);
    assert!(daemon.is_running());
}

#[test]
fn data_and_status_may_be_cut_into_any_pieces() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let (header, data) = (header(OUT, 2), pattern(9, 1024));
    let pieces = [
        Buffer::Out(&header[..5]),
        Buffer::Out(&[header[5..].to_vec(), data[..7].to_vec()].concat()),
        Buffer::Out(&data[7..700]),
        Buffer::Out(&data[700..]),
        Buffer::In(1),
    ];
    assert_eq!(driver.request(0, &pieces), [OK]);
    let header = self::header(IN, 2);
    let pieces = [Buffer::Out(&header), Buffer::In(3), Buffer::In(1000), Buffer::In(22)];
    let bytes = driver.request(0, &pieces);
    assert_eq!((&bytes[..1024], bytes[1024]), (&data[..], OK));
}

#[test]
fn direct_io_copes_with_memory_that_is_not_aligned() {
    for (misaligned_bytes, engine) in [(0, "auto"), (3, "auto"), (0, "blocking"), (3, "blocking")] {
        let disk = image();
        let daemon = start(&disk, &["--direct", "--engine", engine]);
        let options = Options { misaligned_bytes, ..Options::default() };
        let mut driver = Driver::connect(&daemon.socket(), &options);
        let data = pattern(misaligned_bytes + 1, 600 << 10);
        assert_eq!(write(&mut driver, 0, 0, &data), OK, "{}", daemon.log());
        let (bytes, status) = read(&mut driver, 0, 0, 600 << 10);
        assert_eq!(status, OK);
        assert!(bytes == data);
    }
}

#[test]
fn a_guest_that_can_t_flush_writes_through() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let options = Options { features: !(1 << 9), ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    assert_eq!(write(&mut driver, 0, 0, &pattern(2, 4096)), OK);
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(2, 4096), OK));
}
