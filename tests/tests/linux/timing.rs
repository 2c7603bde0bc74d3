//! `nacre run --timing`: what happened when, and how often the guest was left for what.

use anyhow::{Context, Result, ensure};
use nacre_tests::nacre::User;

/// The events of every start, in their order.
const EVENTS: [&str; 10] = [
    "planned, name and network claimed",
    "backends ready",
    "VMM start",
    "VMM's main",
    "first KVM_RUN",
    "init",
    "agent ready",
    "guest configured",
    "container made",
    "container started",
];

/// The events of a table and their milliseconds, in its order.
fn events(said: &str) -> Result<Vec<(&str, f64)>> {
    let lines = said.lines().filter_map(|line| line.trim_start().split_once(" ms  +"));
    lines
        .map(|(after, rest)| {
            let event = rest.split_once(" ms  ").context("an event")?.1;
            Ok((event, after.parse().with_context(|| format!("milliseconds of {event}"))?))
        })
        .collect()
}

/// The counts of the line that begins with `start`: `N what, N what...`.
fn counts<'a>(said: &'a str, start: &str) -> Result<Vec<(u64, &'a str)>> {
    let line = said.lines().find_map(|line| line.strip_prefix(start)?.strip_prefix(": "));
    let line = line.with_context(|| format!("no {start:?} in {said}"))?;
    let count = |figure: &'a str| {
        let (count, what) = figure.split_once(' ').context("a count")?;
        Ok((count.parse()?, what))
    };
    line.split(", ").map(count).collect()
}

#[test]
fn every_part_of_a_start_is_timed_in_order_and_exits_are_counted() -> Result<()> {
    let answer = User::new()?.run(&["--timing"], &["echo", "hello"])?.prints("hello\n")?;
    let events = events(&answer.said)?;
    let names: Vec<&str> = events.iter().map(|(event, _)| *event).collect();
    let expected = [&EVENTS[..], &["container ended", "guest gone"]].concat();
    ensure!(names == expected, "{answer:#?}");
    ensure!(events.is_sorted_by(|(_, a), (_, b)| a <= b), "not in order: {answer:#?}");
    let at =
        |event: &str| events.iter().find(|(name, _)| *name == event).map_or(0.0, |(_, ms)| *ms);
    // A kernel boots between these two, and user space starts between the next.
    ensure!(at("first KVM_RUN") + 10.0 < at("init"), "{answer:#?}");
    ensure!(at("init") < at("agent ready"), "{answer:#?}");

    let ended = "until the container ended";
    let started = "until the container started";
    let exits = |until: &str| counts(&answer.said, &format!("exits to user space {until}"));
    let total =
        |until: &str| -> Result<u64> { Ok(exits(until)?.iter().map(|(count, _)| count).sum()) };
    ensure!(exits(started)?.iter().any(|(count, what)| *what == "port writes" && *count > 0));
    ensure!(0 < total(started)? && total(started)? <= total(ended)?, "{answer:#?}");

    let figures = counts(&answer.said, &format!("KVM {ended}"))?;
    let kvm = |name: &str| {
        let figure = figures.iter().find(|(_, what)| *what == name).map(|(count, _)| *count);
        figure.with_context(|| format!("no {name}: {answer:#?}"))
    };
    // Every exit to user space is one that KVM counts too.
    ensure!(kvm("exits")? >= total(ended)?, "{answer:#?}");
    ensure!(kvm("halt_exits")? > 0 && kvm("irq_injections")? > 0, "{answer:#?}");
    Ok(())
}
