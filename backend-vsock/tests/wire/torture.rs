//! The device's process is killed again and again while bytes flow, connections begin and end, and
//! half of them are closed: nobody may notice.

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use backend_daemon::testing::{DEADLINE, Request};
use backend_vsock::death::DEAD;
use backend_vsock::packet::{Header, Op};

use crate::conversation::{Conversation, Program};
use crate::guest::{Guest, Stream};
use crate::program::Device;
use crate::supervisor::{Supervisor, reconnected};

const KILLS: usize = 200;
/// And how many connections have to end meanwhile.
const ENDS: usize = 50;
/// As many steps as a process lives through at the most.
const STEPS: u64 = 300;
/// How many conversations there are at a time that never end, and that do.
const LONG: u32 = 4;
const SHORT: usize = 4;
/// The host port that the guest asks for.
const HOST_PORT: u32 = 5;
/// Half a TX ring of packets of two buffers: there is always room for one more.
const SENT_AT_ONCE: usize = 16;

/// Marsaglia's xorshift.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    fn bytes(&mut self, end: u64) -> usize {
        usize::try_from(self.below(end)).unwrap()
    }
}

struct World {
    device: Device,
    supervisor: Supervisor,
    guest: Guest,
    listener: UnixListener,
    talks: BTreeMap<u32, Conversation>,
    /// The guest asked for these, and was not answered.
    asked: BTreeMap<u32, (Stream, Option<UnixStream>)>,
    sent: VecDeque<Request>,
    dice: Dice,
    next_port: u32,
    began: usize,
    ended: usize,
    again: usize,
}

impl World {
    fn new(seed: u64) -> Self {
        let (supervisor, device) = Supervisor::start();
        let guest = Guest::connect(&device.daemon.socket());
        let listener = device.listen(HOST_PORT);
        listener.set_nonblocking(true).unwrap();
        Self {
            device,
            supervisor,
            guest,
            listener,
            talks: BTreeMap::new(),
            asked: BTreeMap::new(),
            sent: VecDeque::new(),
            dice: Dice(seed),
            next_port: 1000,
            began: 0,
            ended: 0,
            again: 0,
        }
    }

    fn kill(&mut self) {
        self.supervisor.replace(&mut self.device);
        self.guest.driver.reconnect(&self.device.daemon.socket());
    }

    fn begin(&mut self, lengths: (usize, usize)) {
        let port = self.next_port;
        self.next_port += 1;
        self.began += 1;
        self.talks.insert(port, Conversation::new(port, self.device.dial(), lengths));
    }

    fn guest_asks(&mut self) {
        let port = self.next_port;
        self.next_port += 1;
        self.began += 1;
        let stream = Stream::asking(HOST_PORT, port, 32 << 10);
        self.post(stream.header(Op::Request, 0), &[]);
        self.asked.insert(port, (stream, None));
    }

    fn post(&mut self, header: Header, payload: &[u8]) {
        self.sent.push_back(self.guest.post(header, payload));
    }

    /// Moves everything that can move.
    fn turn(&mut self) {
        while let Some(request) = self.sent.front() {
            if self.guest.driver.wait_for(1, *request, Duration::ZERO).is_none() {
                break;
            }
            self.sent.pop_front();
        }
        self.run_programs();
        while let Some(packet) = self.guest.next_for(Duration::ZERO) {
            self.hear(&packet.header, &packet.payload);
        }
        let ports: Vec<u32> = self.talks.keys().copied().collect();
        for port in ports {
            while self.sent.len() < SENT_AT_ONCE {
                let most = self.dice.bytes(20_000);
                let said = self.talks.get_mut(&port).and_then(|talk| talk.say(most));
                let Some((header, payload)) = said else { break };
                self.post(header, &payload);
                if self.dice.below(4) == 0 {
                    break;
                }
            }
        }
        let before = self.talks.len();
        self.talks.retain(|_port, talk| !talk.is_over());
        self.ended += before - self.talks.len();
    }

    fn run_programs(&mut self) {
        let mut again = Vec::new();
        for (port, talk) in &mut self.talks {
            if talk.run_program(self.dice.bytes(30_000)) == Program::Again {
                again.push(*port);
            }
        }
        for port in again {
            // Nobody had heard of it yet, or the guest would have.
            assert!(!self.talks[&port].is_known(), "{}", self.talks[&port].describe());
            self.again += 1;
            self.talks.remove(&port);
        }
        while let Ok((program, _address)) = self.listener.accept() {
            // One that was asked for; which of them is told by its answer.
            let waiting = self.asked.values_mut().find(|(_stream, program)| program.is_none());
            waiting.expect("nobody asked").1 = Some(program);
        }
    }

    fn hear(&mut self, header: &Header, payload: &[u8]) {
        let port = header.dst_port;
        if let Some((mut stream, program)) = self.asked.remove(&port) {
            assert_eq!(Op::from_number(header.op), Some(Op::Response), "port {port}");
            stream.hear(header);
            let program = program.or_else(|| Some(self.listener.accept().ok()?.0));
            let program = program.expect("it was connected before the answer");
            let lengths = (self.dice.bytes(40_000), self.dice.bytes(40_000));
            self.talks.insert(port, Conversation::by_guest(stream, program, lengths));
            return;
        }
        let talk = self.talks.get_mut(&port);
        talk.unwrap_or_else(|| panic!("{header:?} for nobody")).hear(header, payload);
    }

    fn describe(&self) -> String {
        let talks: Vec<_> = self.talks.values().map(Conversation::describe).collect();
        format!(
            "{}\nasked: {:?}\n{}",
            talks.join("\n"),
            self.asked.keys(),
            self.device.daemon.log()
        )
    }

    /// Turns until nothing is left to do.
    fn finish(&mut self) {
        self.talks.values_mut().for_each(Conversation::finish);
        let deadline = Instant::now() + DEADLINE;
        while !(self.talks.is_empty() && self.asked.is_empty()) {
            assert!(Instant::now() < deadline, "it does not end:\n{}", self.describe());
            self.turn();
            self.talks.values_mut().for_each(Conversation::finish);
        }
    }

    /// Half-closed from the beginning some, both ways the others.
    fn begin_long(&mut self) {
        for _long in 0..LONG {
            self.begin((usize::MAX, usize::MAX));
        }
        self.begin((usize::MAX, 0));
        self.begin((0, usize::MAX));
    }

    /// Has as many short conversations begin as ended.
    fn begin_short(&mut self) {
        while self.talks.len() + self.asked.len() < LONG as usize + 2 + SHORT {
            let lengths = (self.dice.bytes(50_000), self.dice.bytes(50_000));
            // Two that wait for their answer at a time could not be told apart.
            if self.dice.below(2) == 0 && self.asked.is_empty() && self.sent.len() < 8 {
                self.guest_asks();
            } else {
                self.begin(lengths);
            }
        }
    }

    /// Waits until the process has died of itself, and starts one that lives for `steps` steps.
    fn outlive(&mut self, steps: Option<u64>) {
        assert_eq!(self.device.daemon.wait().code(), Some(DEAD), "{}", self.describe());
        self.supervisor.take_in();
        self.device.daemon = self.supervisor.spawn_to_die(&self.device.folder, steps);
    }

    /// Checks what is left when all is over.
    fn check_ended(&mut self) {
        assert_eq!(self.began, self.ended + self.again);
        // The supervisor is left with the listening socket and the pipe.
        let deadline = Instant::now() + DEADLINE;
        while self.supervisor.kept.len() > 3 {
            self.supervisor.take_in();
            assert!(Instant::now() < deadline, "left behind: {:?}", self.supervisor.kept);
        }
    }
}

#[test]
fn nobody_notices_that_the_process_is_killed_hundreds_of_times() {
    let mut world = World::new(0x5eed_cafe);
    world.begin_long();
    let mut kills = 0;
    let deadline = Instant::now() + 6 * DEADLINE;
    while kills < KILLS || world.ended < ENDS {
        assert!(Instant::now() < deadline, "{} ended in {kills} kills", world.ended);
        let until = Instant::now() + Duration::from_micros(world.dice.below(12_000));
        while Instant::now() < until {
            world.turn();
        }
        world.begin_short();
        world.kill();
        kills += 1;
    }
    world.finish();
    world.check_ended();
    // Only those whom a process had accepted and not yet left with its supervisor.
    assert!(world.again < kills / 10, "{} programs had to ask again", world.again);
}

#[test]
fn nobody_notices_that_the_process_dies_at_any_of_its_steps() {
    let mut world = World::new(0xdead_beef);
    world.begin_long();
    world.kill();
    for _warm_up in 0..50 {
        world.turn();
    }
    world.supervisor.kill(&mut world.device);
    world.device.daemon = world.supervisor.spawn_to_die(&world.device.folder, Some(0));
    for steps in 1..STEPS {
        if reconnected(&mut world.device, &mut world.guest) {
            let deadline = Instant::now() + DEADLINE;
            while world.device.daemon.is_running() {
                assert!(Instant::now() < deadline, "it lives:\n{}", world.describe());
                world.begin_short();
                world.turn();
            }
        }
        world.outlive(Some(steps).filter(|steps| *steps < STEPS - 1));
    }
    assert!(reconnected(&mut world.device, &mut world.guest));
    world.finish();
    world.check_ended();
    assert_eq!(world.again, 0);
}
