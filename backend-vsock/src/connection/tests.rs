//! The whole table of phases and events, and what holds in any order of events.

use proptest::prelude::*;

use super::*;
use crate::credit::BUFFER_BYTES;
use crate::packet::{Cid, HOST_CID, TYPE_STREAM};

const PHASES: [(char, Phase); 7] = [
    ('g', Phase::Greeting),
    ('q', Phase::Requesting),
    ('w', Phase::Requested),
    ('a', Phase::Accepting),
    ('o', Phase::Open),
    ('r', Phase::Resetting),
    ('-', Phase::Gone),
];

fn packet(op: Op) -> Event {
    Event::Packet { op, flags: 3, len_bytes: 0 }
}

fn in_phase(phase: Phase) -> Connection {
    Connection::new(phase)
}

fn header(op: Op, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        src_cid: Cid(3),
        dst_cid: HOST_CID,
        src_port: 1,
        dst_port: 2,
        len_bytes: 0,
        kind: TYPE_STREAM,
        op: op.number(),
        flags: 0,
        buf_alloc,
        fwd_cnt,
    }
}

#[test]
fn every_event_in_every_phase_leads_where_the_table_says() {
    // From:  Greeting, reQuesting, Waiting (requested), Accepting, Open, Resetting, - (gone).
    let table = [
        (Event::Named, "qqwaor-"),
        (packet(Op::Request), "gqrrrr-"),
        (packet(Op::Response), "gqorrr-"),
        (packet(Op::Reset), "gq-----"),
        (packet(Op::Shutdown), "gqraor-"),
        (packet(Op::Data), "gqrror-"),
        (packet(Op::CreditUpdate), "gqraor-"),
        (packet(Op::CreditRequest), "gqraor-"),
        (Event::Nonsense, "gqrrrr-"),
        (Event::HostEof, "gqwaor-"),
        (Event::HostDeaf, "gqwaor-"),
        (Event::HostGone, "--raor-"),
        (Event::Flushed, "gqwaor-"),
        (Event::GuestGone, "gq-----"),
    ];
    for (event, row) in table {
        for ((_, from), to) in PHASES.into_iter().zip(row.chars()) {
            let mut connection = in_phase(from);
            connection.apply(event);
            let (_, to) = PHASES.into_iter().find(|(letter, _)| *letter == to).unwrap();
            assert_eq!(connection.phase(), to, "{event:?} in {from:?}");
        }
    }
}

#[test]
fn each_phase_but_open_has_one_thing_to_say_and_goes_on_when_it_is_said() {
    let says = [
        (Phase::Greeting, None),
        (Phase::Requesting, Some((Packet::Request, Phase::Requested))),
        (Phase::Requested, None),
        (Phase::Accepting, Some((Packet::Response, Phase::Open))),
        (Phase::Resetting, Some((Packet::Reset, Phase::Gone))),
        (Phase::Gone, None),
    ];
    for (phase, said) in says {
        let mut connection = in_phase(phase);
        assert_eq!(connection.next(true), said.map(|(packet, _)| packet), "{phase:?}");
        if let Some((packet, next)) = said {
            connection.apply(Event::Sent(packet));
            assert_eq!(connection.phase(), next);
        }
    }
}

#[test]
fn an_answer_greets_the_host_program_once() {
    let mut connection = in_phase(Phase::Requested);
    assert_eq!(connection.apply(packet(Op::Response)), Effect::Greet);
    assert_eq!(connection.apply(packet(Op::Response)), Effect::None);
    assert_eq!(connection.phase(), Phase::Resetting);
}

#[test]
fn a_guest_that_is_done_is_reset_once_its_bytes_are_delivered_and_not_before() {
    let mut connection = in_phase(Phase::Open);
    connection.apply(Event::Flushed);
    connection.apply(Event::Packet { op: Op::Shutdown, flags: 2, len_bytes: 0 });
    connection.apply(Event::Flushed);
    assert_eq!(connection.phase(), Phase::Open);
    connection.apply(Event::Packet { op: Op::Shutdown, flags: 1, len_bytes: 0 });
    assert_eq!(connection.phase(), Phase::Open);
    assert_eq!(connection.next(true), None);
    connection.apply(Event::Flushed);
    assert_eq!(connection.next(false), Some(Packet::Reset));
}

#[test]
fn the_end_of_the_host_program_is_told_after_its_bytes_and_once() {
    let mut connection = in_phase(Phase::Open);
    connection.note_credit(&header(Op::CreditUpdate, 100, 0));
    connection.apply(Event::HostGone);
    assert_eq!(connection.next(true), Some(Packet::Data(100)));
    connection.apply(Event::Sent(Packet::Data(100)));
    // Deaf already, though not yet silent.
    let deaf = Shut { receive: true, send: false };
    assert_eq!(connection.next(true), Some(Packet::Shutdown(deaf)));
    connection.apply(Event::Sent(Packet::Shutdown(deaf)));
    assert_eq!(connection.next(true), Some(Packet::CreditRequest));
    connection.apply(Event::Sent(Packet::CreditRequest));
    assert_eq!(connection.next(true), None);
    connection.note_credit(&header(Op::CreditUpdate, 100, 100));
    assert_eq!(connection.next(true), Some(Packet::Data(100)));
    connection.apply(Event::HostEof);
    let both = Shut { receive: true, send: true };
    assert_eq!(connection.next(false), Some(Packet::Shutdown(both)));
    connection.apply(Event::Sent(Packet::Shutdown(both)));
    assert_eq!(connection.next(true), None);
}

#[test]
fn bytes_for_a_deaf_host_program_are_counted_and_dropped() {
    let mut connection = in_phase(Phase::Open);
    let data = Event::Packet { op: Op::Data, flags: 0, len_bytes: 10 };
    assert_eq!(connection.apply(data), Effect::Deliver);
    connection.apply(Event::HostDeaf);
    assert_eq!(connection.apply(data), Effect::Discard);
}

fn events() -> impl Strategy<Value = Event> {
    let op = prop::sample::select(vec![
        Op::Request,
        Op::Response,
        Op::Reset,
        Op::Shutdown,
        Op::Data,
        Op::Data,
        Op::CreditUpdate,
        Op::CreditRequest,
    ]);
    let packet = (op, 0_u32..4, prop_oneof![0..BUFFER_BYTES, any::<u32>()])
        .prop_map(|(op, flags, len_bytes)| Event::Packet { op, flags, len_bytes });
    prop_oneof![
        8 => packet,
        1 => prop::sample::select(vec![
            Event::Named,
            Event::Nonsense,
            Event::HostEof,
            Event::HostDeaf,
            Event::HostGone,
            Event::Flushed,
            Event::GuestGone,
        ]),
    ]
}

/// How far along its life a connection is: it never goes back.
fn age(phase: Phase) -> u32 {
    match phase {
        Phase::Greeting => 0,
        Phase::Requesting => 1,
        Phase::Requested | Phase::Accepting => 2,
        Phase::Open => 3,
        Phase::Resetting => 4,
        Phase::Gone => 5,
    }
}

proptest! {
    #[test]
    fn no_order_of_events_brings_a_connection_back_or_makes_it_talk_out_of_turn(
        by_host in any::<bool>(),
        steps in prop::collection::vec((events(), any::<bool>(), any::<u16>(), any::<u16>()), 1..100),
    ) {
        let request = header(Op::Request, 4096, 0);
        let mut connection =
            if by_host { Connection::greeting() } else { Connection::accepting(&request) };
        let (mut asked, mut answered, mut ended) = (false, false, false);
        for (event, readable, buf_alloc, fwd_cnt) in steps {
            let before = age(connection.phase());
            if let Event::Packet { op, .. } = event {
                connection.note_credit(&header(op, buf_alloc.into(), fwd_cnt.into()));
            }
            let effect = connection.apply(event);
            if let (Effect::Discard, Event::Packet { len_bytes, .. }) = (effect, event) {
                connection.credit.forward(len_bytes);
            }
            if let Some(packet) = connection.next(readable) {
                let available = connection.credit.available();
                match packet {
                    Packet::Data(most) => {
                        prop_assert!(connection.phase() == Phase::Open && !ended);
                        prop_assert!(most > 0 && most <= available);
                    }
                    Packet::Request => prop_assert!(by_host && !std::mem::replace(&mut asked, true)),
                    Packet::Response => {
                        prop_assert!(!by_host && !std::mem::replace(&mut answered, true));
                    }
                    Packet::Shutdown(shut) => ended |= shut.send,
                    Packet::Reset | Packet::CreditUpdate | Packet::CreditRequest => {}
                }
                connection.apply(Event::Sent(packet));
                connection.credit.tell();
            }
            prop_assert!(age(connection.phase()) >= before);
        }
    }
}
