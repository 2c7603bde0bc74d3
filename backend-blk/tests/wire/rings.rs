//! Many requests, broken rings, and frontends that come and go.

use backend_daemon::testing::{Answer, Buffer, Driver, Malformed, Options, Request};

use super::{GET_ID, IN, OK, OUT, every_way, header, image, pattern, read, start, write};

#[test]
fn many_requests_in_flight_are_each_answered_with_their_own_data() {
    for (options, engine) in every_way() {
        let options = Options { queue_size: 128, ..options };
        let disk = image();
        let daemon = start(&disk, &["--queue-size", "128", "--engine", engine]);
        let mut driver = Driver::connect(&daemon.socket(), &options);
        for round in 0..8 {
            let writes: Vec<Request> = (0..32)
                .map(|slot| {
                    let (header, data) = (header(OUT, slot * 8), pattern(slot + round, 4096));
                    driver.submit(0, &[Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)])
                })
                .collect();
            for request in writes {
                assert_eq!(driver.wait(0, request).bytes, [OK]);
            }
            let reads: Vec<Request> = (0..32)
                .map(|slot| {
                    let header = header(IN, slot * 8);
                    driver.submit(0, &[Buffer::Out(&header), Buffer::In(4096), Buffer::In(1)])
                })
                .collect();
            for (slot, request) in (0..32).zip(reads) {
                let mut expected = pattern(slot + round, 4096);
                expected.push(OK);
                let answer = Answer { written_bytes: 4097, bytes: expected };
                assert_eq!(driver.wait(0, request), answer, "slot {slot}");
            }
        }
    }
}

#[test]
fn more_requests_than_the_queue_holds_at_once_keep_flowing() {
    let disk = image();
    let daemon = start(&disk, &["--queue-size", "4"]);
    let options = Options { queue_size: 4, indirect: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    for slot in 0..64 {
        let header = header(IN, slot);
        let chain = [Buffer::Out(&header), Buffer::In(512), Buffer::In(1)];
        let requests = [(); 4].map(|()| driver.offer(0, &chain));
        driver.kick(0);
        for request in requests {
            assert_eq!(driver.wait(0, request).bytes.last(), Some(&OK));
        }
    }
}

#[test]
fn a_queue_larger_than_expected_is_served_though_not_all_at_once() {
    for engine in ["auto", "blocking"] {
        let disk = image();
        let daemon = start(&disk, &["--queue-size", "4", "--engine", engine]);
        let options = Options { queue_size: 1024, ..Options::default() };
        let mut driver = Driver::connect(&daemon.socket(), &options);
        assert_eq!(driver.config(12, 4), 2_u32.to_le_bytes());
        let requests: Vec<_> = (0..1024 / 3)
            .map(|slot| {
                let header = header(IN, slot % 64);
                driver.offer(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)])
            })
            .collect();
        driver.kick(0);
        for request in requests {
            assert_eq!(driver.wait(0, request).bytes.last(), Some(&OK));
        }
    }
}

#[test]
fn each_queue_serves_its_own_requests() {
    let disk = image();
    let daemon = start(&disk, &["--num-queues", "4"]);
    let options = Options { queues: 4, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    assert_eq!(driver.config(34, 2), [4, 0]);
    for queue in 0..4 {
        let data = pattern(queue.into(), 512);
        assert_eq!(write(&mut driver, queue, queue.into(), &data), OK);
    }
    for queue in 0..4 {
        let other = 3 - queue;
        let expected = (pattern(other.into(), 512), OK);
        assert_eq!(read(&mut driver, queue, other.into(), 512), expected);
    }
}

#[test]
fn a_malformed_chain_stops_its_queue_until_reset_and_not_the_process() {
    let disk = image();
    let mut daemon = start(&disk, &["--num-queues", "2"]);
    let options = Options { queues: 2, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    assert_eq!(write(&mut driver, 1, 0, &pattern(5, 512)), OK);
    for what in Malformed::ALL {
        driver.submit_malformed(0, what);
        assert!(driver.wait_for_error(0), "{what:?} is not reported");
        assert_eq!(read(&mut driver, 1, 0, 512), (pattern(5, 512), OK), "{what:?}");
        driver.reset();
        assert_eq!(read(&mut driver, 0, 0, 512), (pattern(5, 512), OK), "{what:?}");
    }
    assert!(daemon.is_running());
}

#[test]
fn a_second_frontend_is_served_after_the_first_went() {
    let disk = image();
    let mut daemon = start(&disk, &[]);
    let mut first = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(write(&mut first, 0, 0, &pattern(1, 512)), OK);
    drop(first);
    let mut second = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(read(&mut second, 0, 0, 512), (pattern(1, 512), OK));
    assert!(daemon.is_running());
}

#[test]
fn a_frontend_that_comes_back_finds_its_rings_where_it_left_them() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    for sector in 0..10 {
        assert_eq!(write(&mut driver, 0, sector, &pattern(sector, 512)), OK);
    }
    let stopped_at = driver.stop_queue(0);
    assert_eq!(stopped_at, 10);
    // Nobody kicks after the restart: what waits in the ring has to be found.
    let header = header(IN, 7);
    let waiting = driver.offer(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    driver.reconnect(&daemon.socket());
    let answer = driver.wait(0, waiting);
    assert_eq!((&answer.bytes[..512], answer.bytes[512]), (&pattern(7, 512)[..], OK));
}

#[test]
fn a_disabled_queue_rests_until_it_is_enabled() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.enable_queue(0, false);
    let header = header(IN, 0);
    let waiting = driver.submit(0, &[Buffer::Out(&header), Buffer::In(512), Buffer::In(1)]);
    // The answer to this message comes after whatever the kick could have started.
    driver.config(0, 8);
    assert_eq!(driver.in_flight(0), 1);
    driver.enable_queue(0, true);
    assert_eq!(driver.wait(0, waiting).bytes[512], OK);
}

#[test]
fn memory_comes_and_goes_while_the_disk_works() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(write(&mut driver, 0, 0, &pattern(1, 4096)), OK);
    let region = driver.add_memory(1 << 20);
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(1, 4096), OK));
    driver.resend_memory();
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(1, 4096), OK));
    driver.remove_memory(region);
    assert_eq!(read(&mut driver, 0, 0, 4096), (pattern(1, 4096), OK));
}

#[test]
fn memory_comes_and_goes_again_and_again_with_requests_in_flight() {
    let disk = image();
    let daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let data = pattern(1, 4096);
    assert_eq!(write(&mut driver, 0, 0, &data), OK);
    let header = header(IN, 0);
    let buffers = [Buffer::Out(&header), Buffer::In(4096), Buffer::In(1)];
    for _round in 0..100 {
        let waiting: Vec<_> = (0..8).map(|_| driver.submit(0, &buffers)).collect();
        let region = driver.add_memory(1 << 20);
        let new = driver.submit(0, &buffers);
        for request in waiting.into_iter().chain([new]) {
            let answer = driver.wait(0, request).bytes;
            assert_eq!((&answer[..4096], answer[4096]), (&data[..], OK));
        }
        driver.remove_memory(region);
    }
}

#[test]
fn bytes_that_are_no_message_end_the_connection_only() {
    let disk = image();
    let mut daemon = start(&disk, &[]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    driver.send_garbage(&[0xff; 64]);
    let mut next = Driver::connect(&daemon.socket(), &Options::default());
    assert_eq!(read(&mut next, 0, 0, 512).1, OK);
    assert!(daemon.is_running());
}

#[test]
fn a_queue_stops_only_after_what_it_took_is_answered() {
    let disk = image();
    let daemon = start(&disk, &["--direct"]);
    let mut driver = Driver::connect(&daemon.socket(), &Options::default());
    let header = header(OUT, 0);
    let data = pattern(1, 64 << 10);
    let chain = [Buffer::Out(&header), Buffer::Out(&data), Buffer::In(1)];
    let mut base = 0;
    for _round in 0..20 {
        let requests = [(); 16].map(|()| driver.submit(0, &chain));
        let stopped_at = driver.stop_queue(0);
        let taken = usize::from(stopped_at.wrapping_sub(base));
        assert_eq!(driver.in_flight(0), 16 - taken, "taken, and neither answered nor left");
        driver.start_queue(0, stopped_at);
        for request in requests {
            assert_eq!(driver.wait(0, request).bytes, [OK]);
        }
        base += 16;
    }
}

#[test]
fn a_guest_that_refills_the_ring_as_fast_as_it_is_served_can_be_stopped() {
    for engine in ["auto", "blocking"] {
        let disk = image();
        let daemon = start(&disk, &["--engine", engine]);
        let options = Options { indirect: true, ..Options::default() };
        let mut driver = Driver::connect(&daemon.socket(), &options);
        let header = header(GET_ID, 0);
        driver.flood(0, &[Buffer::Out(&header), Buffer::In(21)]);
        driver.stop_queue(0);
        driver.reset();
        assert_eq!(read(&mut driver, 0, 0, 512).1, OK);
    }
}

#[test]
fn more_requests_than_are_taken_at_a_time_need_one_kick() {
    let disk = image();
    let daemon = start(&disk, &["--engine", "blocking"]);
    let options = Options { queue_size: 256, indirect: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let header = header(GET_ID, 0);
    let buffers = [Buffer::Out(&header), Buffer::In(20), Buffer::In(1)];
    let requests: Vec<_> = (0..250).map(|_request| driver.offer(0, &buffers)).collect();
    driver.kick(0);
    for request in requests {
        assert_eq!(driver.wait(0, request).bytes.last(), Some(&OK));
    }
}

#[test]
fn a_chain_has_at_most_1024_descriptors() {
    let disk = image();
    let mut daemon = start(&disk, &[]);
    let options = Options { indirect: true, ..Options::default() };
    let mut driver = Driver::connect(&daemon.socket(), &options);
    let header = header(IN, 0);
    let chain = |buffers: usize| {
        let mut chain = vec![Buffer::Out(&header[..])];
        chain.extend(vec![Buffer::In(512); buffers - 2]);
        chain.push(Buffer::In(1));
        chain
    };
    let answer = driver.request(0, &chain(1024));
    assert_eq!((answer.len(), answer.last()), (1022 * 512 + 1, Some(&OK)));
    driver.submit(0, &chain(1025));
    assert!(driver.wait_for_error(0));
    driver.reset();
    assert_eq!(read(&mut driver, 0, 0, 512).1, OK);
    assert!(daemon.is_running());
}

#[test]
fn every_page_that_the_device_writes_is_logged_while_a_frontend_moves_the_guest() {
    for (options, engine) in every_way() {
        let options = Options { queues: 2, memory_bytes: 1 << 20, misaligned_bytes: 8, ..options };
        let disk = image();
        let daemon = start(&disk, &["--num-queues", "2", "--direct", "--engine", engine]);
        let mut driver = Driver::connect(&daemon.socket(), &options);
        write(&mut driver, 0, 0, &pattern(1, 64 << 10));
        let log = driver.log_dirty();
        let queues_only = log.pages().len();
        assert!((1..=2).contains(&queues_only), "{:?}", log.pages());
        for queue in [0, 1] {
            let (read, write) = (header(IN, 0), header(OUT, 0));
            let requests = [
                driver.offer(queue, &[Buffer::Out(&read), Buffer::In(10_000 - 272), Buffer::In(1)]),
                driver.offer(queue, &[Buffer::Out(&write), Buffer::Out(&[1; 512]), Buffer::In(1)]),
            ];
            let before = driver.pages();
            driver.kick(queue);
            for request in requests {
                driver.wait(queue, request);
            }
            let logged = log.pages();
            let changed = driver.pages().into_iter().filter(|(page, now)| before[page] != *now);
            let changed: Vec<u64> = changed.map(|(page, _now)| page).collect();
            assert!(changed.len() >= 4, "{changed:?}");
            for page in changed {
                assert!(logged.contains(&page), "page {page:#x} was written");
            }
        }
        driver.stop_log();
        let before = log.pages();
        write(&mut driver, 0, 8, &pattern(2, 512));
        assert_eq!(log.pages(), before, "nobody wants to know any more");
    }
}
