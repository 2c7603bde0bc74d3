//! Requests to the kernel's routing netlink socket, one at a time, each answered before the next.

use std::{io, net::IpAddr};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressFlags, AddressMessage},
    link::{LinkAttribute, LinkFlags, LinkMessage},
    neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{
        RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
        RouteType,
    },
};
use netlink_sys::{Socket, protocols::NETLINK_ROUTE};

/// What may be changed of an interface.
#[derive(Clone, Debug)]
pub(super) enum LinkChange {
    Name(String),
    Mtu(u32),
    Up,
}

/// A route by way of an interface.
#[derive(Clone, Debug)]
pub(super) struct KernelRoute {
    /// Address and prefix length; the unspecified address and 0 is the default route.
    pub(super) destination: (IpAddr, u8),
    pub(super) gateway: Option<IpAddr>,
    pub(super) interface_index: u32,
}

/// An entry of the neighbour table that does not age.
#[derive(Clone, Debug)]
pub(super) struct KernelNeighbor {
    pub(super) address: IpAddr,
    pub(super) mac: [u8; 6],
    pub(super) interface_index: u32,
}

/// A connection to the kernel.
pub(super) struct Netlink {
    socket: Socket,
}

impl Netlink {
    pub(super) fn new() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self { socket })
    }

    pub(super) fn change_link(&self, index: u32, change: LinkChange) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        match change {
            LinkChange::Name(name) => message.attributes.push(LinkAttribute::IfName(name)),
            LinkChange::Mtu(mtu) => message.attributes.push(LinkAttribute::Mtu(mtu)),
            LinkChange::Up => {
                message.header.flags = LinkFlags::Up;
                message.header.change_mask = LinkFlags::Up;
            }
        }
        self.ask(RouteNetlinkMessage::SetLink(message), 0)
    }

    pub(super) fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.family = family(address);
        message.header.prefix_len = prefix;
        message.header.index = index;
        message.attributes.push(AddressAttribute::Local(address));
        message.attributes.push(AddressAttribute::Address(address));
        if address.is_ipv6() {
            // Duplicates are the host's to avoid; containers can't wait for the detection.
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        self.ask(RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    pub(super) fn add_route(&self, route: &KernelRoute) -> io::Result<()> {
        let (destination, prefix) = route.destination;
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family(destination),
            destination_prefix_length: prefix,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::Boot,
            // A next hop is in the world at large; without one the destination is on the link.
            scope: if route.gateway.is_some() || destination.is_ipv6() {
                RouteScope::Universe
            } else {
                RouteScope::Link
            },
            kind: RouteType::Unicast,
            ..RouteHeader::default()
        };
        message.attributes.push(RouteAttribute::Oif(route.interface_index));
        if prefix > 0 {
            message.attributes.push(RouteAttribute::Destination(RouteAddress::from(destination)));
        }
        if let Some(gateway) = route.gateway {
            message.attributes.push(RouteAttribute::Gateway(RouteAddress::from(gateway)));
        }
        self.ask(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    pub(super) fn add_neighbor(&self, neighbor: &KernelNeighbor) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(neighbor.address);
        message.header.ifindex = neighbor.interface_index;
        message.header.state = NeighbourState::Permanent;
        let address = match neighbor.address {
            IpAddr::V4(address) => NeighbourAddress::Inet(address),
            IpAddr::V6(address) => NeighbourAddress::Inet6(address),
        };
        message.attributes.push(NeighbourAttribute::Destination(address));
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(neighbor.mac.to_vec()));
        self.ask(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE)
    }

    /// Sends a request and waits for the kernel's verdict.
    fn ask(&self, request: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        message.header.sequence_number = 1;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let (answer, _kernel) = self.socket.recv_from_full()?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(io::Error::other)?;
        match answer.payload {
            NetlinkPayload::Error(verdict) => match verdict.code {
                None => Ok(()),
                Some(_) => Err(verdict.to_io()),
            },
            _ => Err(io::Error::other("the kernel's answer is no verdict")),
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}
